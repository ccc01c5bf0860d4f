"""Bytes of the `flex` dispatchers (DeepEP, HybridEP), which send a token once to each node and each rank.

Routing is taken as even: each token chooses `expert_groups_per_token` groups of experts evenly, and its
experts evenly among those of the groups. tests/plan/test_dispatch.py simulates it.
"""

from __future__ import annotations

from math import comb

from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan.shapes import Shape

PER_COPY = 12
"""Bytes of an expert's number (int64) and its probability (fp32), which travel with every token."""


def reached(model: ModelConfig, size: int) -> float:
    """Probability that a token chooses any of `size` adjacent experts, the first a multiple of `size`.

    1 - sum_j P(j) C(M - r_j, k) / C(M, k): j of the groups that overlap them are chosen, hypergeometric, M
    experts are open to the token and r_j of them are among the `size`. Without groups (one, or pools) M = E.
    """
    experts, k = model.experts, model.experts_per_token
    groups = 1 if model.expert_capacity else model.expert_groups
    chosen, group = min(groups, model.expert_groups_per_token), experts // groups
    if size % group and group % size:
        groups = chosen = 1
        group = experts
    open_experts, overlapping = chosen * group, max(1, size // group)
    missed = 0.0
    for j in range(min(overlapping, chosen) + 1):
        ways = comb(overlapping, j) * comb(groups - overlapping, chosen - j) / comb(groups, chosen)
        missed += ways * comb(open_experts - j * min(size, group), k) / comb(open_experts, k)
    return 1 - missed


def flex_bytes(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> tuple[float, float]:
    """What a process sends to experts, or brings back, through links of a node and through the network.

    A token crosses the network once to each other node
    that has any of its experts, and inside the node once to each rank that has. The busiest process's share,
    as routed rows have it.
    """
    ways = layout.ep * layout.etp
    here = shape.experts_on_node or ways
    nodes = -(-ways // here)
    token = b * model.hidden_size + PER_COPY * model.experts_per_token
    busiest = shape.routed / (shape.sent * layout.etp)
    ranks = layout.ep * reached(model, model.experts // layout.ep) * layout.etp
    inside = ranks * (here - 1) / here
    outside = (nodes - 1) * reached(model, model.experts // nodes) if nodes > 1 else 0.0
    return busiest * shape.tokens * token * inside, busiest * shape.tokens * token * outside
