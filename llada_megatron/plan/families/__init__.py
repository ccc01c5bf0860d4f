"""What planning asks of a model family beside config/families: the module of its name in this package."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

from llada_megatron.config.contents import Contents, Parameters
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan.decoding_work import Active, Work
from llada_megatron.plan.memory import Units
from llada_megatron.plan.rates import Rates
from llada_megatron.plan.shapes import Shape
from llada_megatron.plan.timing import Seconds
from llada_megatron.plan.topology import Group
from llada_megatron.plan.traffic import Message


class PlanFormulas(Protocol):
    """What the module of a family defines."""

    def units(self, model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> Units:
        """Bytes of each building block under a layout."""
        ...

    def seconds_of(
        self,
        model: ModelConfig,
        shape: Shape,
        layout: LayoutConfig,
        at: Rates,
        links: dict[str, Group],
        blocks: Units,
        *,
        forward_only: bool = False,
    ) -> Seconds:
        """Seconds of every building block under a layout."""
        ...

    def of_rank(
        self,
        model: ModelConfig,
        shape: Shape,
        layout: LayoutConfig,
        held: Parameters,
        stages: Sequence[Contents],
        micro_batches: int,
        *,
        b: int,
        gradient_bytes: int = 4,
        passes_before: int = 0,
    ) -> Iterator[tuple[int, Message]]:
        """Every message of a step on a pipeline rank that holds these stages, and how often it is sent."""
        ...

    def decoding_work(
        self, model: ModelConfig, shape: Shape, layout: LayoutConfig, active: Active, at: Rates
    ) -> dict[str, Work]:
        """Operations of one forward of decoding on one rank, by name."""
        ...

    def decoding_messages(
        self, model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int
    ) -> Iterator[tuple[int, Message]]:
        """Messages of such a forward through the model, and how often it sends them."""
        ...

    def assumed_of_shapes(self, model: ModelConfig) -> list[str]:
        """What these formulas and a dry run take for granted of the family's rows, a clause each."""
        ...

    def assumed_of_times(self, model: ModelConfig) -> list[str]:
        """What `seconds_of` takes for granted besides."""
        ...


def plan_formulas_of(model: ModelConfig) -> PlanFormulas:
    """The formulas of model.family; BadInput for a family that has none here, or that is unknown."""
    formulas_of(model)
    name = f"{__name__}.{model.family}"
    if importlib.util.find_spec(name) is None:
        raise BadInput(
            f"There is no formula for what model.family={model.family} keeps, sends and computes:"
            " it can be trained, not planned."
        )
    return cast(PlanFormulas, importlib.import_module(name))
