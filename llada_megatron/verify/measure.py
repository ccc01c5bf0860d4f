"""One layout's figures: a short training run on this rank, and its weights against a reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from llada_megatron.config import rules
from llada_megatron.config.errors import RunFailed
from llada_megatron.config.schema import Config
from llada_megatron.evaluate.likelihood import Evaluator
from llada_megatron.model.initialize import SHARDING_METADATA
from llada_megatron.parallel import groups
from llada_megatron.parallel.ranks import gathered
from llada_megatron.runtime import device
from llada_megatron.training.loop import build_trainer
from llada_megatron.training.step import Trainer, train_step
from llada_megatron.verify.comparison import Measurement
from llada_megatron.verify.routing import RoutingMargin

# megatron-core after our own modules, which make it importable on this machine.
from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # isort: skip


def measure(config: Config, reference: Measurement | None) -> Measurement:
    """Train and evaluate on this rank; every rank returns the figures of all."""
    schedule = rules.check(config)
    device.seed_everything(config.run.seed, config.precision.deterministic)
    groups.initialize(config.layout, threads=0)
    try:
        trainer = build_trainer(config, schedule)
        margin = RoutingMargin(trainer.balance.routers) if reference is None else None
        steps = []
        loads: list[dict[str, list[float]]] = []
        for step in range(schedule.total_steps):
            steps.append(train_step(trainer, step))
            loads.append(_loads(trainer))
        evaluator = Evaluator(config, list(trainer.model))
        fills_masks = not all(stage.geometry.causal for stage in schedule.stages)
        bound = (evaluator.bound(32) if fills_masks else evaluator.autoregressive())["mean"]
        measured = Measurement(
            losses=[step.loss for step in steps],
            grad_norms=[step.grad_norm for step in steps],
            bound=math.nan if bound is None else bound,
            load={layer: [load[layer] for load in loads] for layer in loads[0]},
            routing_margin=margin.smallest if margin else math.nan,
        )
        if reference is None:
            measured.weights = _whole_weights(trainer)
        else:
            measured.weight_differences = _weight_differences(trainer, reference.weights)
        return measured
    finally:
        groups.destroy()


def _loads(trainer: Trainer) -> dict[str, list[float]]:
    """Tokens per expert of every MoE layer of the model, from whichever pipeline stage holds it."""
    balance = trainer.balance
    mine = {}
    if balance.tokens_RE is not None:
        layers = [str(router.layer_number) for router in balance.routers]
        mine = dict(zip(layers, balance.tokens_RE.tolist(), strict=True))
    return {layer: load for part in gathered(mine) for layer, load in part.items()}


def _pieces(trainer: Trainer) -> list[ShardedTensor]:
    """This rank's pieces of every parameter and persistent buffer."""
    found: dict[str, Any] = {
        str(index): chunk.module.sharded_state_dict(metadata=SHARDING_METADATA)
        for index, chunk in enumerate(trainer.model)
    }
    apply_factories(found)
    return [p for p in nested_values(found) if isinstance(p, ShardedTensor) and p.data is not None]


def _place(piece: ShardedTensor) -> tuple[slice, ...]:
    """Where a piece lies in its whole tensor."""
    local = [1] * (len(piece.global_shape) - piece.data.dim()) + list(piece.data.shape)
    return tuple(slice(at, at + size) for at, size in zip(piece.global_offset, local, strict=True))


def _whole_weights(trainer: Trainer) -> dict[str, np.ndarray]:
    whole: dict[str, np.ndarray] = {}
    for piece in _pieces(trainer):
        tensor = whole.setdefault(piece.key, np.full(piece.global_shape, np.nan, dtype=np.float64))
        place = _place(piece)
        tensor[place] = piece.data.detach().double().cpu().numpy().reshape(tensor[place].shape)
    if holes := [key for key, tensor in whole.items() if np.isnan(tensor).any()]:
        raise RunFailed(f"These tensors are not whole after training, or hold NaN: {holes}")
    return whole


def _weight_differences(trainer: Trainer, reference: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative L2 difference of each tensor, the worst over ranks: replicas that drifted apart show too."""
    squares: dict[str, torch.Tensor] = {}
    for piece in _pieces(trainer):
        expected = torch.from_numpy(reference[piece.key][_place(piece)]).reshape(piece.data.shape)
        difference = (piece.data.detach().double().cpu() - expected).square().sum()
        both = torch.stack([difference, expected.square().sum()])
        squares[piece.key] = squares.get(piece.key, torch.zeros(2, dtype=torch.float64)) + both
    mine = {key: float((d / n.clamp(min=1e-300)).sqrt()) for key, (d, n) in squares.items()}
    worst: dict[str, float] = {}
    for part in gathered(mine):
        for key, value in part.items():
            worst[key] = value if math.isnan(value) else max(worst.get(key, 0.0), value)
    return worst
