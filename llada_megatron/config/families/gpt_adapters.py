"""Adapters of the `gpt` family (model/adapters.py): a factor r x in and one out x r beside each linear layer.

layer                  in, out                split over tp       whole
queries, keys, values  H, (nh + 2 ng) hd      B                   A
output projection      nh hd, H               A                   B
gate and up            H, 2F                  B                   A
down                   F, H                   A                   B
the same of experts    H, 2Fe and Fe, H       both over etp       -
"""

from __future__ import annotations

from collections.abc import Sequence

from llada_megatron.config.choices import AdapterTarget
from llada_megatron.config.contents import Contents, Parameters, aligned, separate_experts
from llada_megatron.config.schema import ModelConfig

Factors = list[tuple[int, int]]
"""Elements of each factor, and by how many ways it is split: 1 where it is whole."""


def adapter_parameters(
    model: ModelConfig, contents: Sequence[Contents], base: Parameters, *, tp: int, ep: int, etp: int
) -> Parameters:
    """Those of one process that holds these stages, beside a base model that is frozen."""
    of_dense, of_moe = (_dense_factors(model, tp, moe=moe) for moe in (False, True))
    experts = [size // etp for size in _expert_factors(model)]
    buffers, sharded, replicated, expert = [], 0, 0, 0
    for stage in contents:
        factors = stage.dense * of_dense + stage.moe * of_moe
        sharded += sum(size // ways for size, ways in factors if ways > 1 or tp == 1)
        replicated += sum(size for size, ways in factors if ways == 1 and tp > 1)
        local = stage.moe * (model.experts // ep)
        expert += local * sum(experts)
        total, own = aligned(*(size // ways for size, ways in factors)), local * aligned(*experts)
        buffers.append((total, own) if separate_experts(ep, etp, tp) else (total + own, 0))
    return Parameters(sharded, replicated, expert, base.bias, tuple(buffers), base.trained, base.counts)


def active_adapters(model: ModelConfig) -> int:
    """Elements of adapters that one token passes through in all layers."""
    dense, moe = min(model.dense_layers, model.layers), model.layers - min(model.dense_layers, model.layers)
    factors = dense * _dense_factors(model, 1, moe=False) + moe * _dense_factors(model, 1, moe=True)
    return sum(size for size, _ in factors) + moe * model.experts_per_token * sum(_expert_factors(model))


def _dense_factors(model: ModelConfig, tp: int, *, moe: bool) -> Factors:
    """Of one layer's adapters that tensor parallelism splits."""
    targets = set(model.lora.targets) if model.lora.rank else set()
    shapes = []
    H, D = model.hidden_size, model.head_dim
    if AdapterTarget.attention in targets:
        shapes += [(H, (model.heads + 2 * model.kv_heads) * D, False), (model.heads * D, H, True)]
    target = AdapterTarget.shared_experts if moe else AdapterTarget.dense
    width = model.shared_expert_hidden_size if moe else model.ffn_hidden_size
    if target in targets and width:
        shapes += [(H, 2 * width, False), (width, H, True)]
    found: Factors = []
    for inputs, outputs, splits_inputs in shapes:
        of_a, of_b = (tp, 1) if splits_inputs else (1, tp)
        found += [(model.lora.rank * inputs, of_a), (model.lora.rank * outputs, of_b)]
    return found


def _expert_factors(model: ModelConfig) -> list[int]:
    """Elements of the factors of one expert."""
    if not model.lora.rank or AdapterTarget.experts not in model.lora.targets:
        return []
    H, width, rank = model.hidden_size, model.expert_hidden_size, model.lora.rank
    return [rank * size for size in (H, 2 * width, width, H)]
