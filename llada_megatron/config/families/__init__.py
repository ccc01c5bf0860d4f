"""Model families by the name in model.family: what a run may ask of an architecture without torch.

A family is a module of this package; the stage builder of the same name lies in model/families/, and what
planning needs besides in plan/families/.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from llada_megatron.config.contents import Coarse, Contents, Parameters, Watched
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import dlcm, gpt
from llada_megatron.config.layout_rules import require
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config, LayoutConfig, ModelConfig


class Formulas(Protocol):
    """What the module of a family defines."""

    FILLS_MASKS: bool
    """Whether its models can learn to; otherwise they predict next tokens alone."""

    def check(self, model: ModelConfig) -> None:
        """Raise BadInput for settings of an architecture that cannot be built."""

    def check_layout(self, config: Config) -> None:
        """Raise BadInput for a layout that the family cannot be split by, beside what none can."""

    def check_run(self, config: Config, schedule: Schedule) -> None:
        """Raise BadInput for what else of a run the family does not serve."""

    def stage_contents(self, model: ModelConfig, layout: LayoutConfig) -> list[list[Contents]]:
        """For each pipeline rank its (virtual) stages in the data's order."""
        ...

    def parameters(
        self, model: ModelConfig, contents: Iterable[Contents], *, tp: int = 1, ep: int = 1, etp: int = 1
    ) -> Parameters:
        """Parameters of one process that holds these stages."""
        ...

    def active_weights(self, model: ModelConfig) -> dict[str, int]:
        """Weights that one token passes through in all layers, by module in the words of recompute."""
        ...

    def last_layer_weights(self, model: ModelConfig) -> dict[str, int]:
        """Those of `active_weights` that lie behind the attention of the last layer, which then may go on
        with noisy rows alone; {} where it cannot.
        """
        ...

    def active_adapters(self, model: ModelConfig) -> int:
        """Elements of adapters that one token passes through in all layers; 0 without any."""
        ...

    def pair_flops(self, model: ModelConfig) -> int:
        """Forward FLOPs of a visible query-key pair in all layers."""
        ...

    def before(self, model: ModelConfig) -> tuple[dict[str, int], int]:
        """`active_weights` and `pair_flops` of what a pass before a step's own runs through."""
        ...

    def coarse(self, model: ModelConfig) -> Coarse | None:
        """The part that reads fewer rows than there are tokens; None where each token passes all layers."""
        ...

    def watched(self, model: ModelConfig) -> Watched:
        """The parts that figures by layer tell apart."""
        ...

    def kept_numbers(self, model: ModelConfig, tp: int = 1) -> int:
        """Numbers that decoding keeps of a token in all layers on one process of tp: its keys and values."""
        ...


FAMILIES: dict[str, Formulas] = {"gpt": gpt, "dlcm": dlcm}


def formulas_of(model: ModelConfig) -> Formulas:
    """The formulas of model.family; BadInput naming those that there are."""
    return formulas_named(model.family)


def formulas_named(family: str) -> Formulas:
    """The formulas of a name that model.family has; BadInput naming those that there are."""
    if family not in FAMILIES:
        raise BadInput(f"model.family={family} is unknown: choose from {', '.join(FAMILIES)}.")
    return FAMILIES[family]


def require_masks(model: ModelConfig, what: str) -> None:
    """Raise BadInput where a family that fills no masks is asked for what does."""
    require(
        formulas_of(model).FILLS_MASKS,
        f"{what} fills masks, and the model is of the family {model.family}, which predicts next tokens:"
        " `llada evaluate --ar` gives its likelihood.",
    )
