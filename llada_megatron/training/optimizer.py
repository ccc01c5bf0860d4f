"""megatron-core's DDP and distributed optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._dynamo  # which torch.optim imports when an optimizer is made: half a second of every rank
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from llada_megatron.config.choices import Dtype
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config, LearningRateAtStart
from llada_megatron.config.schema import OptimizerConfig as OptimizerSettings
from llada_megatron.model.widths import rate_divisor
from llada_megatron.runtime import adamw, device

adamw.install()

BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK = 40_000_000, 1_000_000
"""Gradients of one message during backward, the larger of the two; megatron-core's own numbers."""


def wrap(config: Config, stages: list[torch.nn.Module]) -> list[DistributedDataParallel]:
    """Each virtual stage with its gradient buffers, summed and reduced in precision.gradients."""
    layout = config.layout
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.gradients is Dtype.fp32,
        use_distributed_optimizer=True,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        align_param_gather=layout.overlap_param_gather and layout.vpp > 1,
        delay_wgrad_compute=layout.delay_weight_gradients,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # the step checks the norm once and skips
    )
    model = [
        DistributedDataParallel(
            get_model_config(stage),
            ddp,
            stage,
            disable_bucketing=index > 0,
            full_param_layout=_parameter_layout(stage, ddp, in_buckets=index == 0),
        )
        for index, stage in enumerate(stages)
    ]
    if config.model.fusions:
        _sum_inside_products(model)
    schedule = get_model_config(model[0])  # where megatron-core's schedules look
    if ddp.overlap_grad_reduce:  # gradients leave with the last micro-batch of a step, not with each
        schedule.no_sync_func = _for_each([chunk.no_sync for chunk in model])
    if ddp.align_param_gather:
        schedule.param_sync_func = _for_each([partial(_gather_weights, chunk) for chunk in model])
    return model


def _gather_weights(chunk: DistributedDataParallel, *_parameters: Any) -> None:
    """Begin to gather a virtual stage's weights, but for buckets that were gathered since the last update: by
    noise that reads the embedding, a pass before the step's own, an evaluation or a checkpoint.

    DistributedDataParallel.start_param_sync, which megatron-core's schedule asks for, gathers those again.
    """
    for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        if not group.param_gather_dispatched:
            group.start_param_sync()


def _sum_inside_products(model: list[DistributedDataParallel]) -> None:
    """Let TransformerEngine's products add weight gradients to the micro-batches' sum themselves.

    TransformerConfig.gradient_accumulation_fusion would ask it of megatron-core's own layers too (the head),
    which needs Apex (tensor_parallel/layers.py:1070). It needs that sum, so it comes after the wrapping.
    """
    for module in (part for chunk in model for part in chunk.modules()):
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _parameter_layout(
    stage: torch.nn.Module, ddp: DistributedDataParallelConfig, *, in_buckets: bool
) -> FullParamLayout:
    """Where each parameter lies in the gradient buffers, with the padding behind a bucket as part of it.

    megatron-core 0.19.2 gathers the optimizer's state for a checkpoint without that padding but looks
    parameters up with it (distrib_optimizer.py:1398 and 1784), so all but the first bucket would be saved
    shifted. Later versions count alike (pull request 5077 of NVIDIA/Megatron-LM). Buckets only pay where
    backward ends: megatron-core makes them in the first virtual stage of the first pipeline stage.
    """
    dp = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    in_buckets &= ddp.overlap_grad_reduce and parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    layout = DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in stage.parameters() if parameter.requires_grad],
        max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK * dp) if in_buckets else None,
        dp,
        ddp,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )
    for buffer in layout.layouts.values():
        buffer.per_bucket_numel_unpadded = [end - start for start, end in buffer.bucket_indices]
    return layout


def _for_each(functions: list[Callable[..., Any]]) -> Any:
    """One function per virtual stage, or the function itself where there is one stage."""
    return functions if len(functions) > 1 else functions[0]


def build_optimizer(config: Config, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with fp32 masters, sharded over data parallel; no weight decay on norms."""
    settings, moments = config.optimizer, device.DTYPES[config.precision.moments]
    with adamw.moments_in(moments):
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.eps,
                clip_grad=settings.clip_grad,
                bf16=config.precision.dtype == "bf16",
                params_dtype=device.DTYPES[config.precision.dtype],
                use_distributed_optimizer=True,
                overlap_param_gather=config.layout.overlap_param_gather,
            ),
            list(model),
            config_overrides=_overrides(config),
            use_gloo_process_groups=False,
        )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.init_state_fn is None or part.optimizer is None:
            continue
        # Adam makes its moments in its first step; a checkpoint before that (all skipped) needs them.
        if moments is torch.float32:
            part.init_state_fn(part.optimizer, part.config)
            continue
        for param in (each for group in part.optimizer.param_groups for each in group["params"]):
            part.optimizer.initialize_state(param, False)
    get_model_config(model[0]).grad_scale_func = optimizer.scale_loss
    return optimizer


def _overrides(config: Config) -> dict[ParamKey, Any]:
    """Weight decay on matrices alone, and the rates of model/widths.py, by width where a model has muP."""
    overrides: dict[ParamKey, Any] = get_standard_config_overrides(OptimizerConfig())
    model, settings = config.model, config.optimizer

    def divisor(name: str) -> float:
        return rate_divisor(model, re.sub(r"^(module\.)*", "", name))

    widths = {model.hidden_size, model.concepts.hidden_size} if model.concepts.mup_base_hidden_size else ()
    for s in {width / model.concepts.mup_base_hidden_size for width in widths} - {1.0}:
        of_width = ParamWithNamePredicate(f"width_{s}", lambda param, name, s=s: divisor(name) == s)
        overrides[ParamKey(with_name_predicate=of_width)] = {
            "max_lr": settings.lr / s,  # names the group in megatron-core's checkpoints; `apply` sets it
            "lr_mult": 1 / s,
            "eps": settings.eps / s,
        }
    return overrides


class LearningRate:
    """megatron-core's parameter scheduler in units of tokens; a function of the step, so it has no state."""

    def __init__(
        self, optimizer: MegatronOptimizer, settings: OptimizerSettings, schedule: Schedule, rewarm: int
    ):
        self.optimizer, self.schedule, self.rewarm_tokens = optimizer, schedule, rewarm
        self.largest, self.least = settings.lr, settings.min_lr
        self.scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_tokens,
            lr_decay_steps=schedule.total_tokens,
            lr_decay_style=settings.decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=schedule.total_tokens,
            wd_incr_style="constant",
            wsd_decay_steps=settings.wsd_decay_tokens,
            lr_wsd_decay_style="linear",
        )

    def apply(self, step: int) -> float:
        """Set the learning rate of `step`, counting the tokens that it consumes; returns it."""
        consumed = self.schedule.tokens_before(step + 1)
        stage = self.schedule.stage_at(step)
        for group in self.optimizer.param_groups:
            group["max_lr"] = (stage.lr or self.largest) * group["lr_mult"]
            group["min_lr"] = self.least * group["lr_mult"]
        self.scheduler.num_steps = min(consumed, self.schedule.total_tokens)
        self.scheduler.step(0)
        factor = 1.0
        if stage.learning_rate is LearningRateAtStart.rewarm:
            of_stage = consumed - self.schedule.tokens_before(stage.first_step)
            factor = min(1.0, of_stage / self.rewarm_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        return max((group["lr"] for group in self.optimizer.param_groups), default=0.0)


def reset_moments(optimizer: MegatronOptimizer) -> None:
    """Forget Adam's moments and its step count, as at the start of a run."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.param_groups:
            group["step"] = 0
            for param in group["params"]:
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in part.optimizer.state[param]:
                        part.optimizer.state[param][name].zero_()
