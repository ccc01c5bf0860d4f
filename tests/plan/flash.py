"""The layout of a dry run of megatron-core 0.19.2 whose figures several tests know.

LLaDA2-flash on 1024 processes, [x_t ; x_0] of 8192 rows, one sequence per micro-batch, balanced routing. That
run kept the local spec's tensors with fused SwiGLU, gathered both halves' keys, and had a head on all rows.
"""

from dataclasses import replace
from functools import cache

from llada_megatron.config.compose import compose
from llada_megatron.config.contents import Parameters
from llada_megatron.config.families.gpt import parameters, stage_contents
from llada_megatron.config.objectives import RowBytes
from llada_megatron.config.schema import Config, LayoutConfig, ModelConfig
from llada_megatron.plan.shapes import Shape

LAYOUT = LayoutConfig(processes=1024, tp=2, pp=4, cp=2, ep=32, micro_batch=1, global_batch=1024)


@cache
def composed(*overrides: str) -> Config:
    return compose(list(overrides))


def model_of(name: str) -> ModelConfig:
    return composed(f"experiment=llada2_{name}_cpt").model


def config_with(config: Config, **layout: object) -> Config:
    return replace(config, layout=replace(config.layout, **layout))


def balanced_shape(*, tp: int, cp: int, rows: int, micro_batch: int = 1) -> Shape:
    """Sizes of that run: experts_per_token 8, keys of both halves gathered, the head on all rows."""
    S = rows * micro_batch // cp
    return Shape(
        sums=86,
        rows=S,
        tokens=S // tp,
        sent=S // tp * 8,
        routed=S // tp * 8,
        supervised=S,
        keys=S * cp,
        gathered=S * cp if cp > 1 else 0,
        halo=0,
        rotary_rows=rows // cp,
        pairs=0.0,
        row_bytes=RowBytes(),
    )


def held_by(rank: int) -> Parameters:
    return parameters(model_of("flash"), stage_contents(model_of("flash"), LAYOUT)[rank], tp=2, ep=32)
