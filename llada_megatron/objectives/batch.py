"""What an objective hands to the model and to its loss, built on the host: every shape is known there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from megatron.core import parallel_state

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.schema import BlockGrid, ModelConfig
from llada_megatron.data.packed import BadSample, PackedSample, PackedSequences
from llada_megatron.model.inputs import EmbeddingNoise, ModelInputs
from llada_megatron.runtime import device as device_of

ALIGNMENT = 256
"""Tensors that share a piece of memory begin at multiples of so many bytes: kernels load several elements."""


@dataclass
class MicroBatch:
    """Model inputs, and what the objective's loss needs besides the N outputs, under names of its own."""

    inputs: ModelInputs
    rows: dict[str, torch.Tensor]
    """[N] each: weights, bins of figures, whatever belongs to an output."""
    counts: tuple[int, ...] = ()
    """What this micro-batch adds to each of the loss's denominators, as far as known before the model ran."""
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    """What belongs to no output: the same on every context-parallel rank."""
    relative: frozenset[str] = frozenset()
    """Of `rows` those that are places in this micro-batch, so that a sample's depend on its neighbours."""
    places: torch.Tensor | None = None
    """int64 [N]: which outputs of the whole micro-batch are here; None for all of them."""
    memory: torch.Tensor | None = None
    """uint8: where every tensor lies that the device reads, once they are `packed`."""

    def packed(self) -> MicroBatch:
        """The micro-batch with all that a device reads in one piece of pinned memory, keys' tables too."""
        self._shard.prepare()
        sizes: list[int] = []

        def measured(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
            return tensor

        self.map(measured)
        memory = device_of.empty_pinned(sum(sizes))
        parts = iter(memory.split(sizes))

        def laid(tensor: torch.Tensor) -> torch.Tensor:
            return _as(next(parts)[: tensor.nbytes], tensor).copy_(tensor)

        return replace(self.map(laid), memory=memory)

    def to(self, device: torch.device) -> MicroBatch:
        """The micro-batch with all that model and loss read on `device`; on a CPU itself.

        It is one copy, for which the host does not wait.
        """
        if device.type == "cpu":
            return self
        if self.memory is None:
            return self.packed().to(device)
        memory = self.memory.to(device, non_blocking=True)

        def there(tensor: torch.Tensor) -> torch.Tensor:
            start = tensor.storage_offset() * tensor.itemsize
            return _as(memory[start : start + tensor.nbytes], tensor)

        return replace(self.map(there), memory=memory)

    @property
    def _shard(self) -> ContextShard:
        assert isinstance(self.inputs.keys, ContextShard)
        return self.inputs.keys

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """The micro-batch with function(tensor) in the place of every tensor that the device reads."""
        return replace(
            self,
            inputs=replace(self.inputs.map(function), keys=self._shard.map(function)),
            rows={name: function(tensor) for name, tensor in self.rows.items()},
            whole={name: function(tensor) for name, tensor in self.whole.items()},
        )

    def digest(self, sample: int) -> str:
        """SHA-256 of all that one sample of a whole micro-batch brings, whichever others are beside it."""
        B = self.inputs.tokens.shape[0]
        own = self.inputs.outputs % B == sample
        parts = [self.inputs.tokens[sample], self.inputs.outputs[own] // B]
        parts += [self.rows[name][own] for name in sorted(self.rows.keys() - self.relative)]
        if self.inputs.labels is not None:
            parts.append(self.inputs.labels[own])
        if self.inputs.draws is not None:
            parts.append(self.inputs.draws[sample])
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def _as(bytes_n: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Memory, uint8, read as a tensor of that dtype and shape."""
    return bytes_n.view(like.dtype).view(like.shape)


Samples = PackedSequences | Mapping[int, PackedSample]
"""Sequences by their index."""


def read_sample(data: Samples, index: int, vocab_size: int) -> PackedSample:
    """The sample at an index; BadSample for the mask token, or an id that the model has no row for.

    Under tensor parallelism megatron-core would embed such an id as zero and give it a wrong loss, silently.
    """
    sample = data[index]
    outside = np.flatnonzero((sample.tokens < 0) | (sample.tokens >= vocab_size))
    if outside.size:
        raise BadSample(
            f"{sample.document_at(outside[0])} holds token {sample.tokens[outside[0]]}, outside"
            f" model.vocab_size={vocab_size}: prepare the data with the model's tokenizer, set a larger"
            " model.vocab_size, or set training.bad_samples=skip.",
            sample,
        )
    return sample


def left_out(sample: PackedSample, model: ModelConfig) -> PackedSample:
    """The sample for the model to read, but not to learn from: a word stands for each id that cannot be."""
    bad = (sample.tokens < 0) | (sample.tokens >= model.vocab_size) | (sample.tokens == model.mask_token_id)
    word = 0 if model.mask_token_id else 1
    return replace(sample, tokens=np.where(bad, word, sample.tokens), is_left_out=True)


def model_mask(
    samples: list[PackedSample],
    block_size: int,
    grid: BlockGrid,
    *,
    clean_copy: bool,
    causal: bool,
    group_starts: list[np.ndarray] | None = None,
) -> BlockDiffusionMask:
    """The attention mask of a micro-batch; group_starts [L] of each sample, where it has noise groups."""
    return BlockDiffusionMask(
        [torch.from_numpy(sample.cu_seqlens) for sample in samples],
        block_size,
        block_grid=grid,
        clean_copy=clean_copy,
        causal=causal,
        group_starts=None if group_starts is None else np.stack(group_starts),
    )


def flat_outputs(rows: list[np.ndarray]) -> torch.Tensor:
    """int64 [N]: rows of each sample as indices into hidden states [S, B, H] flattened over S and B."""
    return torch.from_numpy(np.concatenate([row * len(rows) + b for b, row in enumerate(rows)]))


def context_part(batch: MicroBatch) -> MicroBatch:
    """This context-parallel rank's part of a micro-batch: rows, outputs and weights of the tokens it holds.

    The batch is built whole on every rank, so masks, labels and noise cannot depend on the split. `counts`,
    which are summed over the ranks, stay with the first.
    """
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return batch
    inputs = batch.inputs
    shard = ContextShard(inputs.keys.mask, parallel_state.get_context_parallel_rank(), ranks)
    B, L, n = shard.mask.batch, shard.mask.length, shard.tokens.shape[1]
    sample = np.arange(B)[:, None]
    position, b = np.divmod(inputs.outputs.numpy(), B)  # of each of the N outputs, in the whole sequence
    half, token = np.divmod(position, L)
    here = torch.from_numpy(np.flatnonzero(shard.owner[b, token] == shard.rank))
    row = half * n + shard.row_of_token[b, token]
    rows = torch.from_numpy(shard.rows)
    part = replace(
        inputs,
        tokens=inputs.tokens[sample, rows],
        positions=inputs.positions.expand(B, -1).gather(1, rows),
        keys=shard,
        outputs=torch.from_numpy(row * B + b)[here],
        labels=None if inputs.labels is None else inputs.labels[here],
        readout=inputs.readout,
        noise=None if inputs.noise is None else _noise_part(inputs.noise, shard),
    )
    return replace(
        batch,
        inputs=part,
        rows={name: tensor[here] for name, tensor in batch.rows.items()},
        counts=batch.counts if shard.rank == 0 else (0,) * len(batch.counts),
        places=here,
    )


def _noise_part(noise: EmbeddingNoise, shard: ContextShard) -> EmbeddingNoise:
    """Of a whole micro-batch's noise what falls on the rows of a rank."""
    rows, places = [], []
    for b, tokens in enumerate(each.numpy() for each in noise.rows):  # of a whole batch rows are tokens
        here = np.flatnonzero(shard.owner[b, tokens] == shard.rank)
        rows.append(torch.from_numpy(shard.row_of_token[b, tokens[here]]))
        places.append(torch.from_numpy(here))
    return replace(noise, rows=rows, places=places)
