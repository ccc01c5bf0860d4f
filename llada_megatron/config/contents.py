"""What pipeline stages hold and how many elements lie on a process: the words in which families count."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNED, BUFFER_MULTIPLE = 64, 128
"""What a parameter's start and a buffer's size are multiples of (megatron-core's param_layout.py)."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What one (virtual) pipeline stage holds."""

    dense: int
    """Dense layers."""
    moe: int
    first: bool
    """Embeds."""
    last: bool
    """Computes the final norm, the head and the loss."""

    @property
    def layers(self) -> int:
        return self.dense + self.moe

    @property
    def last_layers(self) -> int:
        """1 where the last stage has layers: its last one is the model's."""
        return int(self.last and self.layers > 0)

    @property
    def before_last(self) -> tuple[int, int]:
        """Dense and MoE layers but for `last_layers`, which is a MoE layer where there are any."""
        return self.dense - self.last_layers * (not self.moe), self.moe - self.last_layers * (self.moe > 0)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Elements on one process."""

    sharded: int
    """Divided by tensor parallelism."""
    replicated: int
    """Whole on every tensor-parallel process."""
    expert: int
    bias: int
    """Elements of expert_bias: buffers, which have neither gradient nor optimizer state."""
    buffers: tuple[tuple[int, int], ...] = ()
    """Of each virtual stage: elements in the gradient buffers of dense parameters and of experts, each
    parameter starting at a multiple of ALIGNED. Experts have their own where `separate_experts`."""
    frozen: int = 0
    """Elements that adapters stand beside: weights without a gradient. The others are then the adapters'."""
    alike: int = 0
    """Of `replicated` those whose gradient is the same on every tensor-parallel process, and not summed."""
    counts: int = 0
    """Numbers of tokens per expert, beside the routers: fp32, no parameters."""

    @property
    def dense(self) -> int:
        """What data and context parallelism share out to their optimizers."""
        return self.sharded + self.replicated

    @property
    def trained(self) -> int:
        """Those with a gradient and optimizer state."""
        return self.sharded + self.replicated + self.expert


@dataclass(frozen=True)
class Watched:
    """What has figures by layer (training/watch.py)."""

    parts: list[str]
    """Their names, in the order of a forward."""
    layers: dict[str, str]
    """Modules of a pipeline stage that hold layers: a part is called so, with the layer's number."""
    others: dict[str, str]
    """Modules, and the part that has what they hold beside layers."""
    padded: str = ""
    """One of `layers` whose rows are padded; its padding counts in no figure."""


@dataclass(frozen=True, slots=True)
class Coarse:
    """The part of a model that reads fewer rows than there are tokens; where there is one, all experts are in
    it.
    """

    tokens_per_row: float
    parameters: int
    """Of the whole model, all experts among them."""


def aligned(*sizes: int) -> int:
    """Elements that parameters of these sizes take in a buffer."""
    return sum(-(-size // ALIGNED) * ALIGNED for size in sizes)


def separate_experts(ep: int, etp: int, tp: int) -> bool:
    """Whether experts have gradient buffers and an optimizer of their own (megatron-core's layers.py)."""
    return ep > 1 or etp != tp
