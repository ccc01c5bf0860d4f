"""megatron-core's DDP and distributed optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config, LearningRateAtStart
from llada_megatron.config.schema import OptimizerConfig as OptimizerSettings
from llada_megatron.runtime import device


def wrap(stages: list[torch.nn.Module]) -> list[DistributedDataParallel]:
    """Each virtual stage with its gradient buffers, reduced in fp32."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        average_in_collective=False,
        check_for_nan_in_grad=False,  # the step checks the norm once and skips
    )
    return [
        DistributedDataParallel(get_model_config(stage), ddp, stage, disable_bucketing=index > 0)
        for index, stage in enumerate(stages)
    ]


def build_optimizer(config: Config, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with fp32 masters, sharded over data parallel; no weight decay on norms."""
    settings = config.optimizer
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
        ),
        list(model),
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.init_state_fn is not None and part.optimizer is not None:
            # Adam makes its moments in its first step; a checkpoint before that (all skipped) needs them.
            part.init_state_fn(part.optimizer, part.config)
    get_model_config(model[0]).grad_scale_func = optimizer.scale_loss
    return optimizer


class LearningRate:
    """megatron-core's parameter scheduler in units of tokens; a function of the step, so it has no state."""

    def __init__(
        self, optimizer: MegatronOptimizer, settings: OptimizerSettings, schedule: Schedule, rewarm: int
    ):
        self.optimizer, self.schedule, self.rewarm_tokens = optimizer, schedule, rewarm
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
        tokens = self.schedule.tokens_per_step
        self.scheduler.num_steps = min((step + 1) * tokens, self.schedule.total_tokens)
        self.scheduler.step(0)
        stage = self.schedule.stage_at(step)
        factor = 1.0
        if stage.learning_rate is LearningRateAtStart.rewarm:
            factor = min(1.0, (step + 1 - stage.first_step) * tokens / self.rewarm_tokens)
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
