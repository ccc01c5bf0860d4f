"""The decoder: prompts in, blocks and results out, with a cache, in batches, in any layout of one pp_stage.

LLaDA2.0, section 5.4: forwards over a block change the tokens that a rule says (rules/); the finished block
is then history for the next. A forward reads the active blocks of all sequences at hand, each at its own
step, and in front of each block those of its tokens that are final and not kept yet: its prompt at first,
later the block that has just been done. So finished ones leave and waiting ones enter between any two
forwards.

Keys and values are kept from a forward that read final tokens and saw nothing behind them, so they are those
of a forward over the whole sequence, but for rounding.

Legend: S rows of a forward, N of them read by a rule, C figures per row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model

from llada_megatron.attention.keys import KeyPool, PooledKeys
from llada_megatron.config.errors import BadInput
from llada_megatron.generate.graphs import Graphs, graphs_of
from llada_megatron.generate.pages import Pages
from llada_megatron.generate.prompt import BlockChanged, Event, Ids, Limits, Prompt, PromptRead, Result
from llada_megatron.generate.rules import Rule
from llada_megatron.generate.running import Running, Text
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.runtime import device


@dataclass
class Feed:
    """What of a sequence the next forward reads: the tokens that are not kept, up to `stop`."""

    running: Running
    stop: int
    rows: np.ndarray
    """Positions that the rule reads; none where the active block is not reached yet."""


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
        whole = self.context // self.block_size * self.block_size
        self.max_cached_tokens = self.max_cached_tokens or self.batch * whole
        self.pages = Pages(self.max_cached_tokens // self.block_size)
        self._unused_place = self.pages.count * self.block_size
        self._pool = KeyPool(self._unused_place + 1)
        self._tp = parallel_state.get_tensor_model_parallel_world_size()
        self._replicas = parallel_state.get_data_parallel_world_size()
        self._replica = parallel_state.get_data_parallel_rank()
        gathers = get_attr_wrapped_model(self.model, "config").moe_token_dispatcher_type == "allgather"
        self._even = gathers and self._replicas > 1
        self._learns = any(parameter.requires_grad for parameter in self.model.parameters())
        self.graphs: Graphs | None = graphs_of(self.model) if self.cuda_graphs else None
        self._keys: tuple[Any, PooledKeys, torch.Tensor] | None = None

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
            _numbered(place, prompt)
            for place, prompt in enumerate(prompts)
            if place % self._replicas == self._replica
        )
        batch = _Batch(self, mine, limits)
        try:
            yield from self._steps(batch)
        finally:
            batch.leave_all()

    def results(self, prompts: Iterable[Prompt | Ids], limits: Limits = Limits()) -> list[Result]:  # noqa: B008
        """The results of all prompts, in their order."""
        found = [event for event in self.run(prompts, limits) if isinstance(event, Result)]
        return sorted(found, key=lambda result: result.prompt)

    def check(self, number: int, prompt: Prompt | Ids, limits: Limits) -> Running:
        """The prompt, ready to be decoded; BadInput, naming it by its number, where it cannot be."""
        number, prompt = _numbered(number, prompt)
        if len(prompt.draft) and not self.rule.edits:
            raise BadInput(
                f"Prompt {number} has a draft, which this rule would leave as it is: give one that edits,"
                " joint or indel."
            )
        running = Running(
            number,
            prompt,
            limits,
            block_size=self.block_size,
            mask_token_id=self.mask_token_id,
            context=self.context,
        )
        if running.largest > self.pages.count:
            raise BadInput(
                f"Prompt {number} takes {running.largest * self.block_size} cached tokens with what is"
                f" generated, and max_cached_tokens is {self.max_cached_tokens}: raise it, or ask for fewer"
                " new tokens."
            )
        return running

    def _steps(self, batch: _Batch) -> Iterator[Event]:
        done: list[Result] = []
        while True:
            done += batch.enter()
            if not self._replicas > 1:
                yield from done
                if not batch.running:
                    return
            else:
                state = torch.tensor([len(batch.running), len(done)], device=device.device())
                group = parallel_state.get_data_parallel_group()
                dist.all_reduce(state, op=dist.ReduceOp.MAX, group=group)
                anybody_runs, anybody_is_done = state.tolist()
                if anybody_is_done:
                    of_replicas: list[list[Result]] = [[]] * self._replicas
                    dist.all_gather_object(of_replicas, done, group=group)
                    yield from (result for of_one in of_replicas for result in of_one)
                if not anybody_runs:
                    return
            done = []
            feeds = batch.feeds()
            output = self._forward(feeds)
            for feed, rows in zip(
                feeds, np.split(output, np.cumsum([len(f.rows) for f in feeds])), strict=False
            ):
                changed, result = batch.read(feed, rows)
                yield changed
                if result is not None:
                    done.append(result)

    def _forward(self, feeds: list[Feed]) -> np.ndarray:
        """The head's figures for the rows that the rule reads, [N, C]. Without feeds the other replicas'
        experts are served all the same: ranks of one expert-parallel group call the model equally often.
        """
        parts = [(feed.running.kept, feed.running.places(feed.stop)) for feed in feeds]
        tokens = [feed.running.tokens[feed.running.kept : feed.stop] for feed in feeds]
        ends = np.cumsum([len(each) for each in tokens], dtype=np.int64)
        S = int(ends[-1]) if feeds else 0
        if unused := self._rows_beside(S):
            parts.append((0, np.full(unused, self._unused_place)))
            tokens.append(np.zeros(unused, np.int64))
        chosen = [end - feed.stop + feed.rows for end, feed in zip(ends, feeds, strict=True)]
        outputs = np.concatenate([*chosen, [0][: not any(map(len, chosen))]]).astype(np.int64)
        keys, positions = self._keys_of(parts)
        inputs = ModelInputs(
            tokens=torch.from_numpy(np.concatenate(tokens))[None].to(device.device()),
            positions=positions,
            keys=keys,
            outputs=torch.from_numpy(outputs).to(device.device()),
            readout=self.rule.figures.readout(self.mask_token_id),
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

    def _keys_of(self, parts: list[tuple[int, np.ndarray]]) -> tuple[PooledKeys, torch.Tensor]:
        """The keys and the positions of the rows, [1, S]: the last forward's, as long as no block is done."""
        asked = [(kept, places.tobytes()) for kept, places in parts]
        if self._keys is None or self._keys[0] != asked:
            keys = PooledKeys(self._pool, parts, self.block_size).to(device.device())
            self._keys = asked, keys, torch.from_numpy(keys.positions)[None].to(device.device())
        return self._keys[1:]


_REFUSED = {
    "pp": "Decoding serves one pipeline stage: a forward waits for the tokens that the last one chose",
    "cp": "Decoding serves no context parallelism: a forward has the rows of a few blocks alone",
}


def _numbered(place: int, prompt: Prompt | Ids) -> tuple[int, Prompt]:
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
    return place if prompt.number is None else prompt.number, prompt


class _Batch:
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
        for block in range(running.first // size):
            page = self.pages.share(running.digest(block))
            if page is None:
                break
            running.pages.append(page)
        running.kept = len(running.pages) * size

    def _missing(self, running: Running, stop: int) -> int:
        return -(-stop // self.decoder.block_size) - len(running.pages)

    def _leave(self, running: Running) -> None:
        for page in running.pages:
            self.pages.release(page)
        running.pages, running.kept = [], 0

    def leave_all(self) -> None:
        """Nobody is decoded any more; what was kept may serve later prompts."""
        for running in self.running:
            self._leave(running)
        self.running = []

    def feeds(self) -> list[Feed]:
        """What the next forward reads: at most `prefill_tokens` beside active blocks, the oldest ones
        first."""
        size, budget = self.decoder.block_size, max(self.decoder.prefill_tokens, self.decoder.block_size)
        feeds = []
        for running in list(self.running):
            ahead = min(running.first - running.kept, budget // size * size)
            budget -= ahead
            is_read = running.kept + ahead == running.first
            stop = running.stop if is_read else running.kept + ahead
            if stop > running.kept and running in self.running and self._make_room(running, stop):
                rows = running.rows_read(self.decoder.rule) if is_read else np.zeros(0, np.int64)
                feeds.append(Feed(running, stop, rows))
        return feeds

    def _make_room(self, running: Running, stop: int) -> bool:
        """Pages for the tokens before `stop`; False where the sequence itself had to be put back for older
        ones."""
        for _ in range(self._missing(running, stop)):
            while (page := self.pages.take()) is None:
                youngest = self.running.pop()
                self._leave(youngest)
                self._put_back.appendleft(youngest)
                self.decoder.counts.put_back += 1
                if youngest is running:
                    return False
            running.pages.append(page)
        return True

    def read(self, feed: Feed, output: np.ndarray) -> tuple[PromptRead | BlockChanged, Result | None]:
        """Take in what a forward said of a sequence, [rows, C], and what it wrote to the sequence's pages."""
        running, decoder = feed.running, self.decoder
        if feed.stop <= running.first:
            running.forwards["prefill"] += 1
            self._keep(running, feed.stop)
            return PromptRead(running.number, feed.stop, running.first), None
        self._keep(running, running.first)
        changed, is_kept = running.step(decoder.rule, feed.rows, output, decoder.seed)
        result = running.ended(changed, decoder.rule, decoder.text)
        if changed.is_done:
            stop = running.stop
            running.next_block()
            if is_kept and stop % decoder.block_size == 0:
                self._keep(running, stop)
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
