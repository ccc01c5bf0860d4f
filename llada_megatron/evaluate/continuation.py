"""log p(continuation | context) of many pairs, several to a forward, in any layout of tp, ep and dp.

Autoregressive models give it exactly, by the chain rule. Of block diffusion it is a bound. With m_b tokens of
the continuation in block b of the pair (blocks count from the context's first token, as a prompt's do),

    -log p(continuation | context) <= sum over b of E_k E_{|M| = k} [ m_b / k  sum_{i in M} CE_i ]

where k is uniform in 1..m_b, M a uniform subset of the continuation's tokens in block b, and CE_i the cross
entropy of token i given block b without M and the clean tokens before it (LLaDA, arXiv 2502.09992, eq. 6, by
block; public code has it for one block that is the whole answer, `get_log_likelihood.py` there). A token of
the context is never masked. The right side is what decoding in any order of a block's tokens, averaged over
all orders, has as its expected negative log-likelihood; Jensen's inequality makes it a bound, which is the
likelihood itself where every m_b is 1: in block 1, or of one token.

The estimate of the right side is unbiased. Blocks do not interact: masks of block b reach only the cross
entropies of block b, so the sum over blocks has the sum of their means, whether or not the counts of blocks
are drawn together, and one pass over [x_t ; x_0] serves all blocks. In a block the count of each draw is
uniform in 1..m_b and its subset uniform of that count, so the mean of each draw is the right side, and so is
that of all, however they are drawn together. They are so that little is left to chance: in pairs, k tokens
and what is left of them with one more (objectives/bound.py: antithetic_count_mask), with counts that step
evenly through 1..m_b from pair to pair.

Draws are functions of (seed, number of the pair, draw, place of the token), so no batch or layout changes
them. `llada generate` may write a continuation with another probability: this one averages over all orders,
a rule takes one.

Legend: T tokens of a forward, of several pairs one after the other; N of them scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid, Config
from llada_megatron.data.packed import PackedSample
from llada_megatron.generate.prompt import Ids
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.readout import CONFIDENCE, CROSS_ENTROPY
from llada_megatron.objectives.autoregressive import autoregressive_batch
from llada_megatron.objectives.bound import antithetic_count_mask
from llada_megatron.objectives.diffusion import diffusion_inputs, readout_of
from llada_megatron.objectives.passes import evaluating
from llada_megatron.parallel.dealing import data_parallel
from llada_megatron.runtime import device

Mask = Callable[[int, int, int, int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(seed, number, draw, draws, starts, scored) -> masked and weights, as objectives/bound.py has them."""
WINDOWS = 2**20
"""More than a text has: the draws of window w of text n are those of number n * WINDOWS + w."""


@dataclass(frozen=True)
class Pair:
    """What is scored, given what."""

    number: int
    """Decides its draws."""
    context: Ids
    """May be empty, but not for an autoregressive model, whose first token nothing predicts."""
    continuation: Ids


@dataclass(frozen=True)
class Likelihood:
    """What a model makes of a pair."""

    number: int
    nats: float
    """log p(continuation | context), or the estimate of its lower bound."""
    se: float | None
    """Standard error of the estimate over the draws; 0 where it is exact, None of less than two pairs of
    draws. Pairs are taken as independent, so it is too large on average where stratification helps."""
    is_greedy: bool | None = None
    """Of an autoregressive model: whether each token was the most probable one."""


@dataclass(frozen=True)
class _Unit:
    """One draw of one pair."""

    pair: Pair
    draw: int
    draws: int

    @property
    def length(self) -> int:
        return len(self.pair.context) + len(self.pair.continuation)

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [n], and which of them are scored."""
        tokens = np.concatenate([self.pair.context, self.pair.continuation]).astype(np.int64)
        return tokens, np.arange(len(tokens)) >= len(self.pair.context)


@dataclass
class Scorer:
    """Scores pairs with one model; every rank is given all pairs and gets all results.

    Raises BadInput, where it is made, for a layout with pipeline or context parallelism and for a number of
    draws that is neither 1 nor even.
    """

    config: Config
    """Its layout is that of the process groups."""
    model: torch.nn.Module
    block_size: int
    """0: the model is autoregressive. One that holds the whole of each pair: full attention, as LLaDA's."""
    draws: int = 32
    """Masks of a pair; one is enough where each block holds at most one scored token."""
    seed: int = 0
    tokens: int = 1024
    """Of a forward, at least as many as the longest pair has."""
    mask: Mask = antithetic_count_mask

    def __post_init__(self) -> None:
        for axis in ("pp", "cp"):
            if getattr(self.config.layout, axis) > 1:
                raise BadInput(f"Likelihoods of continuations serve tp, ep and dp: set layout.{axis}=1.")
        if self.draws < 1 or (self.draws > 1 and self.draws % 2):
            raise BadInput(f"{self.draws} draws: give 1 or an even number, since masks come in pairs.")

    def run(self, pairs: Sequence[Pair]) -> Iterator[Likelihood]:
        """The likelihood of each pair, as it is there.

        Raises BadInput for an empty context of an autoregressive model. Every rank runs it to its end.
        """
        for pair in pairs:
            if not len(pair.continuation):
                yield Likelihood(pair.number, 0.0, 0.0, True if self.block_size == 0 else None)
        scored = [pair for pair in pairs if len(pair.continuation)]
        if self.block_size == 0 and not all(len(pair.context) for pair in scored):
            raise BadInput("Nothing predicts the first token of an autoregressive model: give a context.")
        batches = self._batches(scored)
        if not batches:
            return
        rank, replicas = data_parallel()
        tp = parallel_state.get_tensor_model_parallel_world_size()
        longest = max(unit.length for batch in batches for unit in batch)
        T = -(-max(sum(unit.length for unit in batch) for batch in batches) // tp) * tp
        found: dict[int, list[tuple[float, float]]] = {}
        with evaluating([self.model]):
            for at in range(0, len(batches), replicas):
                # A replica without work repeats the last: experts of all are called equally often.
                mine = self._sums(batches[min(at + rank, len(batches) - 1)], longest, T)
                of_all = self._from_replicas(mine, [len(batch) for batch in batches[at : at + replicas]])
                units = [unit for batch in batches[at : at + replicas] for unit in batch]
                for unit, sums in zip(units, of_all, strict=True):
                    draws = found.setdefault(unit.pair.number, [])
                    draws.append(sums)
                    if len(draws) == unit.draws:
                        yield self._likelihood(unit, found.pop(unit.pair.number))

    def _batches(self, pairs: Sequence[Pair]) -> list[list[_Unit]]:
        """Draws of pairs, in order, as many to a forward as it has tokens for."""
        units = []
        for pair in pairs:
            draws = 1 if self._is_exact(pair) else self.draws
            units += [_Unit(pair, draw, draws) for draw in range(draws)]
        room = max([self.tokens, *(unit.length for unit in units)])
        batches: list[list[_Unit]] = []
        free = 0
        for unit in units:
            if unit.length > free:
                batches.append([])
                free = room
            batches[-1].append(unit)
            free -= unit.length
        return batches

    def _is_exact(self, pair: Pair) -> bool:
        return self.block_size <= 1 or len(pair.continuation) == 1

    def _sums(self, units: list[_Unit], longest: int, T: int) -> np.ndarray:
        """float64 [units, 2]: of each its weighted cross entropies, and how many tokens were not the best."""
        inputs, weights, owner = self._inputs(units, longest, T)
        output = self.model(inputs.map(lambda tensor: tensor.to(device.device()))).double().cpu().numpy()
        nats, wrong = (output[:, 0], 1 - output[:, 2]) if output.ndim > 1 else (output, 0 * output)
        sums = [np.bincount(owner, each, len(units)) for each in (nats * weights, wrong)]
        return np.stack(sums, axis=1)

    def _inputs(self, units: list[_Unit], longest: int, T: int) -> tuple[ModelInputs, np.ndarray, np.ndarray]:
        """The model's inputs, and of each of the N rows its weight and whose it is."""
        texts, scored = zip(*(unit.packed() for unit in units), strict=True)
        lengths = [unit.length for unit in units]
        if rest := T - sum(lengths):  # a document that nobody scores
            texts, scored, lengths = (*texts, [0] * rest), (*scored, [False] * rest), [*lengths, rest]
        owner = np.repeat(np.arange(len(lengths)), lengths)
        sample = PackedSample(
            np.concatenate(texts).astype(np.int64),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            supervised=np.concatenate(scored).astype(bool),
        )
        if self.block_size == 0:
            inputs = autoregressive_batch([sample]).inputs
            inputs.readout = CONFIDENCE
            owner = owner[inputs.outputs.numpy()]
            weights = np.ones(len(owner))
        else:
            masked, weights = self._masks(sample, units)
            inputs = diffusion_inputs(
                [sample],
                [masked],
                block_size=self.block_size if self.block_size < longest else T,
                grid=BlockGrid.document,
                mask_token_id=self.config.model.mask_token_id,
            )
            inputs.readout = readout_of(CROSS_ENTROPY, self.config)
            owner, weights = owner[masked], weights[masked]
        copies = inputs.tokens.shape[1] // T
        positions = np.concatenate([np.arange(length) for length in lengths])
        inputs.positions = torch.from_numpy(np.tile(positions, copies))[None]
        inputs.keys = inputs.keys.to(device.device())
        return inputs, weights, owner

    def _masks(self, sample: PackedSample, units: list[_Unit]) -> tuple[np.ndarray, np.ndarray]:
        """masked bool [T] and weights float64 [T] of one draw of each pair."""
        assert sample.supervised is not None
        starts = block_starts(sample.cu_seqlens, self.block_size, BlockGrid.document)
        masked, weights = np.zeros(len(starts), dtype=bool), np.zeros(len(starts))
        for unit, start in zip(units, sample.cu_seqlens.tolist(), strict=False):
            part = slice(start, start + unit.length)
            masked[part], weights[part] = self.mask(
                self.seed,
                unit.pair.number,
                unit.draw,
                unit.draws,
                starts[part],
                sample.supervised[part],
            )
        return masked, weights

    def _from_replicas(self, mine: np.ndarray, counts: list[int]) -> list[tuple[float, float]]:
        """The rows of every replica's part that counts, in the order of the replicas."""
        rank, replicas = data_parallel()
        whole = torch.zeros(sum(counts), 2, dtype=torch.float64, device=device.device())
        if rank < len(counts):
            whole.split(counts)[rank].copy_(torch.from_numpy(mine))
        if replicas > 1:
            dist.all_reduce(whole, group=parallel_state.get_data_parallel_group())
        return [(first, second) for first, second in whole.cpu().tolist()]

    def _likelihood(self, unit: _Unit, sums: list[tuple[float, float]]) -> Likelihood:
        nats, wrong = np.array(sums).T
        is_greedy = not wrong.any() if self.block_size == 0 else None
        if self._is_exact(unit.pair):
            return Likelihood(unit.pair.number, -float(nats.mean()), 0.0, is_greedy)
        pairs = nats.reshape(-1, min(2, len(nats))).mean(axis=1)
        error = float(pairs.std(ddof=1)) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
        return Likelihood(unit.pair.number, -float(pairs.mean()), error, is_greedy)


def windows(number: int, context: Ids, continuation: Ids, length: int, *, exact: bool) -> list[Pair]:
    """The pairs that score each token of a continuation once, each at most `length` tokens long.

    One where everything fits, or fits without the context's beginning; else windows of as much context as
    there is room for: all but the last score `length` tokens without any, or, `exact` (of an autoregressive
    model), length - 1 given one. The grid of blocks begins with each window.
    """
    whole = np.concatenate([context, continuation]).astype(np.int64)
    pairs: list[Pair] = []
    at = len(context)
    step = length - 1 if exact else length
    while at < len(whole) or not pairs:
        stop = min(at + step, len(whole))
        start = max(0, stop - length)
        pairs.append(Pair(number * WINDOWS + len(pairs), whole[start:at], whole[at:stop]))
        at = stop
    return pairs


def of_windows(number: int, found: Sequence[Likelihood]) -> Likelihood:
    """The likelihood of a text whose windows these are; errors of windows add up as independent ones do."""
    errors = [each.se for each in found]
    error = None if None in errors else math.sqrt(sum(each**2 for each in errors if each is not None))
    greedy = [each.is_greedy for each in found]
    return Likelihood(
        number,
        sum(each.nats for each in found),
        error,
        None if None in greedy else all(greedy),
    )
