"""The decoder: prompts in, blocks and results out, with a cache, in batches, in any layout of one pp_stage.

LLaDA2.0, section 5.4: forwards over a block change the tokens that a rule says (rules/); the finished block
is then history for the next. Several blocks of a sequence may be active at a time (buffer.py), and several
versions of them (branches.py). A forward reads the active blocks of all sequences at hand, each at its own
step, and in front of them those tokens of each that are final and not kept yet: its prompt at first, later
the block that has just been done. So finished ones leave and waiting ones enter between any two forwards.

Keys and values are kept from a forward that read final tokens and saw nothing behind them, so they are those
of a forward over the whole sequence, but for rounding.

Legend: S rows of a forward, N of them read by a rule, C figures per row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model

from llada_megatron.attention.keys import KeyPool, PooledKeys, PoolPart
from llada_megatron.config.errors import BadInput
from llada_megatron.generate.branches import ANCHOR_ALONE, Lookahead
from llada_megatron.generate.buffer import ONE_BLOCK, Buffer
from llada_megatron.generate.feed import Feed, Part
from llada_megatron.generate.graphs import Graphs, graphs_of
from llada_megatron.generate.methods import Method
from llada_megatron.generate.pages import Pages
from llada_megatron.generate.prompt import BlockChanged, Event, Ids, Limits, Prompt, PromptRead, Result
from llada_megatron.generate.rules import Rule
from llada_megatron.generate.running import Running, Text
from llada_megatron.model.inputs import ModelInputs, SoftTokens
from llada_megatron.model.readout import Readout
from llada_megatron.parallel import groups
from llada_megatron.runtime import device


@dataclass
class Counts:
    """What a decoder has done so far, over all its prompts on this replica."""

    forwards: int = 0
    rows: int = 0
    shared_tokens: int = 0
    """Whose keys were there already, of an earlier prompt or turn."""
    put_back: int = 0
    """Sequences whose pages were taken away for an older one."""


@dataclass
class Decoder:
    """Decodes prompts with one model.

    What is kept of a prompt stays for the next ones that begin alike, as the turns of a chat do, until its
    room is needed. Under data parallelism every rank is given all prompts, decodes its share of them, and
    yields the results of all; every rank must run the iterator to its end. Raises BadInput where it is made
    for a layout with pipeline or context parallelism.
    """

    model: torch.nn.Module
    """One pp_stage, which is called in the mode it is in: call `eval()` first."""
    rule: Rule
    block_size: int
    """Of the stage that the model was trained with last; other sizes work less well."""
    mask_token_id: int
    context: int
    """Positions that the model was trained for."""
    batch: int = 8
    """Sequences of a forward, at most."""
    max_cached_tokens: int = 0
    """Room for keys and values, in tokens, of all sequences together: others wait, and the youngest is put
    back and computed again where the older ones need its room. 0: as many as `batch` sequences can have."""
    prefill_tokens: int = 1024
    """Rows of a forward beside those of the active blocks: longer prompts take several."""
    buffer: Buffer = ONE_BLOCK
    """Blocks of a sequence that are active at a time."""
    lookahead: Lookahead = ANCHOR_ALONE
    """Branches of a sequence that are read at a time: dealt over the ranks of layout.bp."""
    seed: int = 0
    """Of draws, which are functions of (seed, prompt, position, step)."""
    text: Text | None = None
    """Token ids to text: without it there are neither texts nor stop strings."""
    cuda_graphs: bool = False
    """Run the forwards within a block as CUDA graphs (generate/graphs.py); BadInput where none can be. The
    model is changed for it: nothing can learn it any more."""
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        for axis, ranks in (
            ("pp", parallel_state.get_pipeline_model_parallel_world_size()),
            ("cp", parallel_state.get_context_parallel_world_size()),
        ):
            if ranks > 1:
                raise BadInput(f"{_REFUSED[axis]}. Set layout.{axis}=1.")
        if not 1 <= self.block_size <= self.context:
            raise BadInput(
                f"A block of {self.block_size} is no part of the model's context of {self.context}: choose a"
                " block size that is, or raise data.sequence_length if the model reads further."
            )
        self.method = Method(self.rule, self.buffer, self.lookahead)
        self._bp_group, self.branch_rank, self._bp = groups.branch_parallel()
        self._check_branches()
        most = self.longest + self._beside(self.longest)
        self.max_cached_tokens = self.max_cached_tokens or self.batch * most
        self.pages = Pages(self.max_cached_tokens // self.block_size)
        self._unused_place = self.pages.count * self.block_size
        self._pool = KeyPool(self._unused_place + 1)
        self._tp = parallel_state.get_tensor_model_parallel_world_size()
        self._dp = parallel_state.get_data_parallel_world_size()
        self._replicas = self._dp // self._bp
        self._replica = parallel_state.get_data_parallel_rank() // self._bp
        gathers = get_attr_wrapped_model(self.model, "config").moe_token_dispatcher_type == "allgather"
        self._even = gathers and self._dp > 1
        self._learns = any(parameter.requires_grad for parameter in self.model.parameters())
        self.graphs: Graphs | None = graphs_of(self.model) if self.cuda_graphs else None
        self._keys: tuple[Any, PooledKeys, torch.Tensor] | None = None
        self._figures = self.lookahead.figures(self.rule.figures)

    def _check_branches(self) -> None:
        branches = self.lookahead.branches
        if branches > self.block_size:
            raise BadInput(
                f"{branches} lookahead branches are more than the {self.block_size} tokens of a block, of"
                " which each adds one: ask for fewer (--branches)."
            )
        if branches and self.rule.edits:
            raise BadInput(
                "Lookahead branches (--branches) need a rule that fills masks and leaves other tokens alone,"
                " such as threshold."
            )
        if (branches + 1) % self._bp:
            raise BadInput(
                f"{branches} lookahead branches and the anchor are no multiple of layout.bp={self._bp} ranks:"
                f" ask for {-(-(branches + 1) // self._bp) * self._bp - 1} (--branches), or change layout.bp."
            )

    def _beside(self, longest: int) -> int:
        """Tokens at most of the active blocks of further versions on a rank, in a sequence of `longest`."""
        return self.versions_beside * min(self.buffer.blocks * self.block_size or longest, longest)

    @property
    def versions_beside(self) -> int:
        """Branches of a sequence on a rank beside the first one, or the shadow of a rule that verifies."""
        return (self.lookahead.branches + 1) // self._bp - 1 or int(self.rule.verifies)

    @property
    def longest(self) -> int:
        """Positions of the longest sequence: whole blocks."""
        return self.context // self.block_size * self.block_size

    @property
    def seen_block(self) -> int:
        """Tokens of a block up to whose end a row sees its sequence."""
        return self.block_size

    @property
    def cache_bytes(self) -> int:
        """What the keys and values take on this rank, once there was a forward."""
        return self._pool.bytes

    def run(self, prompts: Iterable[Prompt | Ids], limits: Limits = Limits()) -> Iterator[Event]:  # noqa: B008
        """What each forward read or changed as it happens, and each result as it is there: not in the order
        of the prompts.

        What forwards did is told of this rank's replica. Raises BadInput for a prompt that cannot be decoded,
        naming it by its number, when it is its turn; `check` says so beforehand.
        """
        mine = (
            numbered(place, prompt)
            for place, prompt in enumerate(prompts)
            if place % self._replicas == self._replica
        )
        batch = self._batch(mine, limits)
        try:
            yield from self._steps(batch)
        finally:
            batch.leave_all()

    def results(self, prompts: Iterable[Prompt | Ids], limits: Limits = Limits()) -> list[Result]:  # noqa: B008
        """The results of all prompts, in their order."""
        found = [event for event in self.run(prompts, limits) if isinstance(event, Result)]
        return sorted(found, key=lambda result: result.prompt)

    def begun[Kind: Running](
        self, kind: type[Kind], number: int, prompt: Prompt | Ids, limits: Limits
    ) -> Kind:
        """The prompt before its first forward; BadInput for a draft that the rule would leave as it is."""
        number, prompt = numbered(number, prompt)
        if len(prompt.draft) and not self.rule.edits:
            raise BadInput(
                f"Prompt {number} has a draft, which this rule would leave as it is: give one that edits,"
                " joint or indel."
            )
        return kind(
            number,
            prompt,
            limits,
            block_size=self.block_size,
            mask_token_id=self.mask_token_id,
            context=self.context,
        )

    def check(self, number: int, prompt: Prompt | Ids, limits: Limits) -> Running:
        """The prompt, ready to be decoded; BadInput, naming it by its number, where it cannot be."""
        return self.fitting(self.begun(Running, number, prompt, limits))

    def fitting[Kind: Running](self, running: Kind) -> Kind:
        """The sequence; BadInput where all of it, with what is generated, has no room in the cache."""
        largest = running.largest * self.block_size
        largest += self._beside(largest)
        if largest > self.pages.count * self.block_size:
            raise BadInput(
                f"Prompt {running.number} takes {largest} cached tokens with what is"
                f" generated, and max_cached_tokens is {self.max_cached_tokens}: raise it, or ask for fewer"
                " new tokens."
            )
        return running

    def _batch(self, prompts: Iterator[tuple[int, Prompt]], limits: Limits) -> Batch:
        return Batch(self, prompts, limits)

    def _steps(self, batch: Batch) -> Iterator[Event]:
        done: list[Result] = []
        while True:
            done += batch.enter()
            if self._dp == 1:
                yield from done
                if not batch.running:
                    return
            else:
                state = torch.tensor([len(batch.running), len(done)], device=device.device())
                group = parallel_state.get_data_parallel_group()
                dist.all_reduce(state, op=dist.ReduceOp.MAX, group=group)
                anybody_runs, anybody_is_done = state.tolist()
                if anybody_is_done:
                    of_ranks: list[list[Result]] = [[]] * self._dp
                    dist.all_gather_object(of_ranks, done, group=group)
                    yield from (result for of_one in of_ranks[:: self._bp] for result in of_one)
                if not anybody_runs:
                    return
            done = []
            feeds = batch.feeds()
            for feed, outputs in zip(feeds, self._said(feeds), strict=True):
                changed, result = batch.read(feed, outputs)
                yield changed
                if result is not None:
                    done.append(result)

    def _said(self, feeds: list[Feed]) -> list[list[np.ndarray]]:
        """One forward: the head's figures of the rows of each feed's branches, [n, C], on every rank."""
        said: list[list[np.ndarray | None]] = [[None] * len(feed.rows) for feed in feeds]
        for rank, output in enumerate(self._of_branch_ranks(feeds, self._forward(feeds))):
            at = 0
            for feed, of_feed in zip(feeds, said, strict=True):
                for which in self.dealt(len(feed.rows), rank):
                    after = at + len(feed.rows[which])
                    if of_feed[which] is None:  # else read for its keys alone
                        of_feed[which] = output[at:after]
                    at = after
        return cast(list[list[np.ndarray]], said)

    def _of_branch_ranks(self, feeds: list[Feed], output: np.ndarray) -> list[np.ndarray]:
        """The output of each rank that has branches of the same sequences, whose numbers of rows differ."""
        if self._bp == 1:
            return [output]
        counts = [
            sum(len(feed.rows[which]) for feed in feeds for which in self.dealt(len(feed.rows), rank))
            for rank in range(self._bp)
        ]
        rows = torch.from_numpy(output).to(device.device())
        padded = rows.new_zeros(max([*counts, 1]), rows.shape[1])
        padded[: len(rows)] = rows
        of_ranks = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(of_ranks, padded, group=self._bp_group)
        return [of_rank[:count].cpu().numpy() for of_rank, count in zip(of_ranks, counts, strict=True)]

    def dealt(self, branches: int, rank: int) -> list[int]:
        """Which of so many branches a rank reads; the first one where none is left for it, since every rank
        keeps the keys of what is final.
        """
        return list(range(rank, branches, self._bp)) or [0][:branches]

    def _forward(self, feeds: list[Feed]) -> np.ndarray:
        """The head's figures for the rows of this rank's parts, [N, C]. Without feeds the other replicas'
        experts are served all the same: ranks of one expert-parallel group call the model equally often.
        """
        read = [part for feed in feeds for part in feed.parts()]
        return self._call(read, self._figures.readout(self.mask_token_id))

    def _call(self, read: Sequence[Part], readout: Readout) -> np.ndarray:
        """What the head says of the chosen rows, [N, C]; of any other one where none is chosen."""
        read, S = [*read], sum(len(part.tokens) for part in read)
        if unused := self._rows_beside(S):
            nothing, at = np.zeros(unused, np.int64), np.full(unused, self._unused_place)
            none = nothing[:0]
            read.append(Part(PoolPart(0, at), nothing, np.ones(unused, np.float32), none, none))
        begins = np.cumsum([0, *(len(part.tokens) for part in read)])
        chosen = [begin + part.rows for begin, part in zip(begins, read, strict=False)]
        stand_in = [0][: not any(map(len, chosen))]
        outputs = np.concatenate([*chosen, stand_in]).astype(np.int64)
        labels = np.concatenate([*(part.labels for part in read), stand_in]).astype(np.int64)
        keys, positions = self._keys_of([part.keys for part in read])
        inputs = ModelInputs(
            tokens=torch.from_numpy(np.concatenate([part.tokens for part in read]))[None].to(device.device()),
            positions=positions,
            keys=keys,
            outputs=torch.from_numpy(outputs).to(device.device()),
            labels=torch.from_numpy(labels).to(device.device()) if readout.needs_labels else None,
            readout=readout,
            soft=SoftTokens.of(
                np.concatenate([part.weights for part in read]), self.mask_token_id, device.device()
            ),
        )
        with self._without_gradients():
            output = (self.graphs or self.model)(inputs)
        self.counts.forwards += 1
        self.counts.rows += S
        return (output if output.dtype is torch.float64 else output.float()).cpu().numpy()

    def _without_gradients(self) -> AbstractContextManager[Any]:
        """inference_mode is a tenth faster in small forwards, but nothing can be learnt from what a layer
        keeps of one: it is not for a model that is being trained.
        """
        return torch.no_grad() if self._learns else torch.inference_mode()

    def _rows_beside(self, S: int) -> int:
        """Rows that belong to no sequence: without any the experts of other replicas would wait, sequence
        parallelism splits them evenly, and the dispatcher `allgather` wants as many on every rank.
        """
        rows = -(-max(S, 1) // self._tp) * self._tp
        if self._even:
            most = torch.tensor(rows, device=device.device())
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
            rows = int(most)
        return rows - S

    def _keys_of(self, parts: list[PoolPart]) -> tuple[PooledKeys, torch.Tensor]:
        """The keys and the positions of the rows, [1, S]: the last forward's, as long as no block is done."""
        asked = [(rows, *(b"" if at is None else at.tobytes() for at in places)) for rows, *places in parts]
        if self._keys is None or self._keys[0] != asked:
            keys = PooledKeys(self._pool, parts, self.seen_block).to(device.device())
            self._keys = asked, keys, torch.from_numpy(keys.positions)[None].to(device.device())
        return self._keys[1:]


_REFUSED = {
    "pp": "Decoding serves one pipeline stage: a forward waits for the tokens that the last one chose",
    "cp": "Decoding serves no context parallelism: a forward has the rows of a few blocks alone",
}


def numbered(place: int, prompt: Prompt | Ids) -> tuple[int, Prompt]:
    """A prompt and its number: its own, or its place among the prompts."""
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
    return place if prompt.number is None else prompt.number, prompt


class Batch:
    """The sequences at hand, oldest first, and those that wait."""

    def __init__(self, decoder: Decoder, prompts: Iterator[tuple[int, Prompt]], limits: Limits) -> None:
        self.decoder, self.pages, self.limits = decoder, decoder.pages, limits
        self.running: list[Running] = []
        self._put_back: deque[Running] = deque()
        self._prompts = prompts

    def enter(self) -> list[Result]:
        """Let waiting sequences in as long as there is room; returns what is done without a forward."""
        done = []
        while len(self.running) < self.decoder.batch and (waiting := self._next()) is not None:
            waiting.began = waiting.began or time.perf_counter()
            if waiting.is_filled:
                done.append(waiting.untouched(self.decoder.text))
                continue
            self._share(waiting)
            if self.running and self._missing(waiting, waiting.stop) > self.pages.available:
                self._leave(waiting)
                self._put_back.appendleft(waiting)
                break
            self.running.append(waiting)
            self.decoder.counts.shared_tokens += waiting.kept
        return done

    def _next(self) -> Running | None:
        if self._put_back:
            return self._put_back.popleft()
        number, prompt = next(self._prompts, (0, None))
        return None if prompt is None else self.decoder.check(number, prompt, self.limits)

    def _share(self, running: Running) -> None:
        """Begin with the pages that hold the first blocks of the sequence already."""
        size = self.decoder.block_size
        for block in range(running.before // size):
            page = self.pages.share(running.digest(block))
            if page is None:
                break
            running.pages.append(page)
        running.kept = len(running.pages) * size

    def _missing(self, running: Running, stop: int) -> int:
        return -(-stop // self.decoder.block_size) - len(running.pages)

    def _leave(self, running: Running) -> None:
        for page in [*running.pages, *chain(*running.pages_beside)]:
            self.pages.release(page)
        running.pages, running.pages_beside, running.kept = [], [], 0

    def leave_all(self) -> None:
        """Nobody is decoded any more; what was kept may serve later prompts."""
        for running in self.running:
            self._leave(running)
        self.running = []

    def feeds(self) -> list[Feed]:
        """What the next forward reads: at most `prefill_tokens` beside active blocks, the oldest ones
        first."""
        decoder = self.decoder
        size, budget = decoder.block_size, max(decoder.prefill_tokens, decoder.block_size)
        feeds = []
        for running in list(self.running):
            ahead = min(running.first - running.kept, budget // size * size)
            budget -= ahead
            is_read = running.kept + ahead == running.first
            stop = running.stop if is_read else running.kept + ahead
            if stop > running.kept and running in self.running and self._make_room(running, stop):
                rows = running.read_rows(decoder.rule) if is_read else []
                here = decoder.dealt(len(rows), decoder.branch_rank)
                shadows = [block for block, _ in running.shadows(decoder.rule)]
                feeds.append(Feed(running, stop, rows, here, shadows))
        return feeds

    def _make_room(self, running: Running, stop: int) -> bool:
        """Pages for the tokens before `stop`, and for the active blocks of further branches or of a shadow;
        False where the sequence itself had to be put back for older ones.
        """
        missing = [(running.pages, self._missing(running, stop))]
        if stop > running.first:
            active = -(-stop // self.decoder.block_size) - running.first // self.decoder.block_size
            versions = len(running.lookahead) or len(running.shadows(self.decoder.rule))
            beside = min(self.decoder.versions_beside, versions)
            running.pages_beside += [[] for _ in range(beside - len(running.pages_beside))]
            missing += [(pages, active - len(pages)) for pages in running.pages_beside]
        for pages, count in missing:
            for _ in range(count):
                while (page := self.pages.take()) is None:
                    youngest = self.running.pop()
                    self._leave(youngest)
                    self._put_back.appendleft(youngest)
                    self.decoder.counts.put_back += 1
                    if youngest is running:
                        return False
                pages.append(page)
        return True

    def read(self, feed: Feed, outputs: list[np.ndarray]) -> tuple[PromptRead | BlockChanged, Result | None]:
        """Take in what a forward said of a sequence's branches, [n, C] each, and wrote to its pages."""
        running, decoder = feed.running, self.decoder
        if not feed.rows:
            running.forwards["prefill"] += 1
            self._keep(running, feed.stop)
            return PromptRead(running.number, feed.stop, running.first), None
        self._keep(running, running.first)
        changed, kept = running.step(decoder.method, outputs, decoder.seed)
        result = running.ended(changed, decoder.rule, decoder.text)
        running.advance(decoder.buffer)
        if kept % decoder.block_size == 0:
            self._keep(running, kept)
        if result is not None:
            self._leave(running)
            self.running.remove(running)
        return changed, result

    def _keep(self, running: Running, stop: int) -> None:
        """The pages before `stop` hold what they shall hold."""
        size = self.decoder.block_size
        for block in range(running.kept // size, stop // size):
            self.pages.holds(running.pages[block], running.digest(block))
        running.kept = max(running.kept, stop)
