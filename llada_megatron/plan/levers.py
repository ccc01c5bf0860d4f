"""What each switch is worth: a layout planned again with one of them turned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llada_megatron.config import rules
from llada_megatron.config.choices import CudaGraphPart, Dispatcher, Dtype, Fp8, LayerSpec
from llada_megatron.config.errors import BadInput
from llada_megatron.config.flops import mfu
from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.topology import gpus

Settings = dict[str, Any]
"""By whole name."""
TURNED_ON: tuple[Settings, ...] = (
    {"layout.dispatcher": Dispatcher.deepep},
    {"layout.overlap_experts": True},
    {"layout.overlap_experts": True, "layout.delay_weight_gradients": True},
    {"layout.overlap_shared_experts": True},
    {"layout.overlap_tensor_parallel": True},
    {"layout.overlap_grad_reduce": True},
    {"layout.overlap_grad_reduce": True, "layout.overlap_param_gather": True},
    {"precision.fp8": Fp8.blockwise},
    {"precision.gradients": Dtype.bf16},
    {"precision.moments": Dtype.bf16},
    {"model.fusions": True},
    {"training.cuda_graphs": [CudaGraphPart.moe_router, CudaGraphPart.moe_preprocess]},
)
TURNED_OFF: tuple[Settings, ...] = (
    {"layout.dispatcher": Dispatcher.alltoall},
    {"layout.overlap_experts": False, "layout.delay_weight_gradients": False},
    {"layout.delay_weight_gradients": False},
    {"layout.overlap_shared_experts": False},
    {"layout.overlap_tensor_parallel": False},
    {"layout.overlap_grad_reduce": False, "layout.overlap_param_gather": False},
    {"precision.fp8": Fp8.none},
    {"precision.gradients": Dtype.fp32},
    {"precision.moments": Dtype.fp32},
    {"model.fusions": False},
    {"training.cuda_graphs": []},
)
LAYERS: Settings = {"model.layer_spec": LayerSpec.transformer_engine}
"""What several switches need; it is set beside those that are refused without."""


@dataclass(frozen=True)
class Effect:
    """One turn of a switch, in one stage of the schedule."""

    overrides: tuple[str, ...]
    is_on: bool
    """Whether a switch is turned on."""
    step_seconds: float
    mfu: float
    peak_bytes: int
    """On the fullest process, over the whole schedule."""
    fits: bool


def effects(planner: Planner, schedule: Schedule, stage: Stage) -> list[Effect]:
    """Every single turn that changes something and is allowed, the fastest first."""
    found = [
        effect
        for is_on, choices in ((True, TURNED_ON), (False, TURNED_OFF))
        for settings in choices
        for effect in _effect(planner, schedule, stage, settings, is_on)
    ]
    return sorted(found, key=lambda effect: effect.step_seconds)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The run with settings of other values."""
    for name, value in settings.items():
        group, key = name.split(".")
        config = replace(config, **{group: replace(getattr(config, group), **{key: value})})
    return config


def peak_bytes(planner: Planner, schedule: Schedule) -> int:
    """On the fullest process, over the whole schedule."""
    layout = planner.config.layout
    placement, peaks = planner.place(layout), []
    for stage in schedule.stages:
        for rank in range(layout.pp):
            kept, _, transient = planner.peak(layout, placement, stage, rank)
            peaks.append(sum(placement.static[rank].values()) + kept + transient)
    return max(peaks)


def _effect(
    planner: Planner, schedule: Schedule, stage: Stage, settings: Settings, is_on: bool
) -> Iterator[Effect]:
    """None where nothing would change, or the rules of training refuse it."""
    new = {name: value for name, value in settings.items() if value_of(planner.config, name) != value}
    if not new:
        return
    for also in ({}, LAYERS) if is_on else ({},):
        config = with_settings(planner.config, new | also)
        try:
            rules.check(config)
        except BadInput:
            continue
        other = Planner(config, expert_imbalance=planner.expert_imbalance, documents=planner.documents)
        step = other.step(config.layout, other.place(config.layout), stage)
        peak = peak_bytes(other, schedule)
        speed = stage.tokens / stage.steps / step.total
        shown = tuple(f"{name}={_text(value)}" for name, value in (new | also).items())
        share = mfu(config, stage, speed, devices=gpus(planner.cluster), documents=planner.documents)
        yield Effect(shown, is_on, step.total, share, peak, peak <= planner.usable_bytes)
        return


def value_of(config: Config, name: str) -> Any:
    """Of a setting by its whole name."""
    group, key = name.split(".")
    return getattr(getattr(config, group), key)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
