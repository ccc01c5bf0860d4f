"""Where the clean half of `[x_t ; x_0]` ends with its keys and values in the last layer.

Nobody reads what that layer makes of clean rows, unless a balance counts them there or an objective
supervises them: neither output projection, experts nor the norms behind them need to see them.
"""

from __future__ import annotations

from llada_megatron.config.choices import Fp8
from llada_megatron.config.families import formulas_of
from llada_megatron.config.layout import pipeline_stages
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config, LayoutConfig, ModelConfig


def balance_needs_clean_rows(model: ModelConfig) -> bool:
    """Whether experts of the last layer are balanced over clean rows, or dealt out among all rows together.

    The z loss is a mean over all rows; rows_cap and pools of block routing let rows compete.
    """
    router = model.router
    among_all = model.expert_balance_clean_half or model.expert_capacity or router.z_loss or router.rows_cap
    return model.has_experts and bool(among_all)


def kernels_need_one_size(config: Config, layout: LayoutConfig) -> bool:
    """Whether something has buffers of one size for every layer, or was never tried with fewer rows."""
    return bool(
        layout.overlap_tensor_parallel
        or layout.dispatcher.is_flex
        or layout.offload_modules
        or config.training.cuda_graphs
        or config.precision.fp8 is not Fp8.none
    )


def drops_clean_rows(config: Config, layout: LayoutConfig) -> bool:
    """Whether the last layer is built to go on with noisy rows alone, where outputs are noisy rows.

    A last pipeline stage without layers waits for as many rows as any other.
    """
    model = config.model
    can = formulas_of(model).last_layer_weights(model) and pipeline_stages(model.layers, layout)[-1]
    needed = balance_needs_clean_rows(model) or kernels_need_one_size(config, layout)
    return bool(can) and not needed


def needed_rows_per_token(config: Config, stage: Stage) -> int:
    """Rows of each data token that something reads behind the last layer's attention."""
    clean = stage.geometry.supervises_clean_half or balance_needs_clean_rows(config.model)
    return stage.rows_per_token if clean else 1


def last_rows_per_token(config: Config, layout: LayoutConfig, stage: Stage) -> int:
    """Rows of each data token that pass what lies behind the last layer's attention."""
    needed = needed_rows_per_token(config, stage)
    return needed if drops_clean_rows(config, layout) else stage.rows_per_token
