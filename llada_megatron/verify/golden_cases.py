"""What golden cases store, computed by this project's own code, and how far the two are apart.

A case is checked on what it stores; what it cannot be computed without is asked for by name.
Legend: S positions, L tokens per sequence, B sequences, H hidden size, E experts, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid
from llada_megatron.model.gpt import BlockDiffusionStage, layers_of
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.readout import LOGITS
from llada_megatron.runtime import device
from llada_megatron.verify.golden_set import REMEDY, Golden, Stored

TOLERANCES = {
    "mask": 0.0,  # entries that differ
    "rate": 1e-6,  # of masking
    "chosen": 0.0,  # the ends of a clip
    "routing": 0.0,  # pairs of token and layer with another set of experts
    "tokens": 0.0,  # greedy tokens that differ; of decoding also what was read, proposed and filled in
    "forwards": 0.0,  # of decoding that differ in their kind, their positions or the number of changes
    "confidence": 1e-4,  # probability that a decoding rule judged
    "lengths": 0.0,  # conversations with another length in blocks
    "logits": 1e-3,
    "hidden_states": 2e-4,
    "final_norm": 2e-4,
    "router_weights": 1e-4,
    "right": 0.0,  # predictions that are right here and wrong there, or the reverse
    "cross_entropy": 1e-3,
    "entropy": 1e-3,
    "loss": 1e-5,  # relative, as are all below but where it says so
    "grad_norms": 1e-3,
    "gradients": 1e-3,
    "boundary_probability": 1e-6,  # of concepts, absolute, as are the next four
    "boundaries": 0.0,  # tokens that open a concept here and not there, or the reverse
    "concepts": 1e-6,
    "concept_attention": 1e-10,
    "parser": 1e-6,
    "bound": 1e-5,
    "variance": 1e-5,
    "preference": 1e-4,  # a loss of small differences of large bounds
    "preference_norms": 2e-3,
}
"""Largest difference by quantity; absolute unless said otherwise. Their basis is in the cases' README.md."""

KINDS = ("mdlm", "bdlm", "causal", "block_causal")
MAX_POSITION = 1 << 24
"""Positions are exact in fp32 below it."""


@dataclass
class CaseResult:
    """The worst difference of each quantity of one case."""

    name: str
    differences: dict[str, float]

    @property
    def passed(self) -> bool:
        return not self.failed()

    def failed(self) -> list[str]:
        """Quantities beyond their tolerance."""
        return [name for name, value in self.differences.items() if not value <= TOLERANCES[name]]


def largest(difference: Tensor) -> float:
    """The largest magnitude; a huge one, which JSON can hold, if anything is not finite."""
    return float(difference.abs().nan_to_num(nan=torch.finfo(difference.dtype).max).max())


def relative(ours: Tensor | float, expected: Tensor | float) -> float:
    """|ours - expected| / |expected|, in the Euclidean norm for tensors; of two zeros it is zero."""
    ours, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, expected))
    if not ours.any() and not expected.any():
        return 0.0
    return largest((ours - expected).norm() / expected.norm())


def mask_case(golden: Golden, name: str) -> CaseResult:
    """The mask function alone; `name` is n{L}_bs{block size}."""
    length, block_size = (int(part.lstrip("nbs")) for part in name.split("_"))
    mask = BlockDiffusionMask([torch.tensor([0, length])], block_size).dense()
    allowed = golden.stored.under("maskfn").like(name, mask)
    return CaseResult(f"maskfn {name}", {"mask": float((mask != allowed.bool()).sum())})


def case_mask(name: str, case: dict[str, Any], positions: int) -> BlockDiffusionMask:
    """The attention mask that a forward case describes; BadInput for lengths that do not add up."""
    kind = case["kind"]
    length = positions // 2 if kind == "bdlm" else positions
    lengths, size = case.get("doc_lens", [length]), case.get("block_size", 1)
    whole = isinstance(lengths, list) and all(type(n) is int and n > 0 for n in (*lengths, size))
    if not whole or sum(lengths) != length or (kind == "bdlm" and positions % 2):
        raise BadInput(
            f"Case {name} has block_size {size} and doc_lens {lengths} for {length} tokens: give positive"
            " numbers that add up."
        )
    return BlockDiffusionMask(
        [torch.tensor([0, *np.cumsum(lengths)])],
        case.get("block_size", 1 if kind == "causal" else length),
        block_grid=BlockGrid.document
        if case.get("block_grid", "").startswith("document-local")
        else BlockGrid.sequence,
        clean_copy=kind == "bdlm",
        causal=kind in ("causal", "block_causal"),
    )


@contextmanager
def recorded(stage: BlockDiffusionStage) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, for a batch of one, the residual stream, the final norm and every router's choice."""
    seen: dict[str, list[Tensor]] = {"hidden_states": [], "final_norm": [], "chosen": [], "weights": []}

    def keep_hidden(_module: Any, _inputs: Any, output: Any) -> None:
        seen["hidden_states"].append((output[0] if isinstance(output, tuple) else output)[:, 0])

    def keep_norm(_module: Any, _inputs: Any, output: Tensor) -> None:
        seen["final_norm"].append(output[:, 0])

    def keep_routing(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        seen["weights"].append(output[0])
        seen["chosen"].append(output[1])

    handles = [stage.embedding.register_forward_hook(keep_hidden)]
    for layer in layers_of(stage):
        handles.append(layer.register_forward_hook(keep_hidden))
        if hasattr(layer.mlp, "router"):
            handles.append(layer.mlp.router.register_forward_hook(keep_routing))
    handles.append(stage.decoder.final_layernorm.register_forward_hook(keep_norm))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def forward_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """Mask, logits and whatever else of the forward pass is stored."""
    stored = golden.stored.under(name)
    tokens = stored.ids("input_ids", golden.model.vocab_size)
    S = len(tokens)
    mask = case_mask(name, case, S)
    at = device.device()
    inputs = ModelInputs(
        tokens=tokens[None].to(at),
        positions=stored.ids("position_ids", MAX_POSITION)[None].to(at),
        keys=ContextShard(mask),
        outputs=torch.arange(*_rows(name, case, S), device=at),
        readout=LOGITS,
    )
    with torch.no_grad(), recorded(golden.stage) as seen:
        logits = golden.stage(inputs)
    ours = {
        "logits": logits,
        "hidden_states": torch.stack(seen["hidden_states"]),
        "final_norm": seen["final_norm"][0],
    }
    differences = {
        key: largest(value.cpu() - stored.like(key, value)) for key, value in ours.items() if key in stored
    }
    if "attn_allowed" in stored:
        dense = mask.dense()
        differences["mask"] = float((dense != stored.like("attn_allowed", dense).bool()).sum())
    if "router_topk_idx" in stored and seen["chosen"]:
        weights, chosen = (torch.stack(seen[key]).cpu() for key in ("weights", "chosen"))
        differences |= routing(golden, stored, weights, chosen)
    return CaseResult(name, differences)


def routing(golden: Golden, stored: Stored, weights_LSE: Tensor, chosen_LSE: Tensor) -> dict[str, float]:
    """How the choice of experts differs, and, where they are stored, the weights of those chosen."""
    k = golden.model.experts_per_token
    experts = stored.like("router_topk_idx", chosen_LSE[..., :k]).long()
    if not 0 <= experts.min() <= experts.max() < golden.model.experts:
        raise BadInput(f"cases.safetensors holds router_topk_idx of experts that are none: {REMEDY}.")
    expected = torch.zeros_like(chosen_LSE, dtype=torch.bool).scatter(-1, experts, True)
    differences = {"routing": float((chosen_LSE.bool() != expected).any(-1).sum())}
    if "router_topk_weight" in stored:
        weights = stored.like("router_topk_weight", experts)
        expected = torch.zeros_like(weights_LSE).scatter(-1, experts, weights.to(weights_LSE.dtype))
        differences["router_weights"] = largest(weights_LSE - expected)
    return differences


def _rows(name: str, case: dict[str, Any], positions: int) -> list[int]:
    """The first position whose logits are stored, and the one after the last."""
    rows = case.get("logits_rows", [0, positions])
    if not isinstance(rows, list) or not all(type(row) is int for row in rows) or len(rows) != 2:
        raise BadInput(f"Case {name} has logits_rows {rows}: give the first row and the one after the last.")
    return rows


def greedy_case(golden: Golden, name: str) -> CaseResult:
    """Autoregressive continuation by argmax, the whole prefix computed again for each token."""
    stored, vocabulary = golden.stored.under(name), golden.model.vocab_size
    prompt, expected = (stored.ids(key, vocabulary) for key in ("prompt", "output"))
    tokens, at = prompt.to(device.device()), device.device()
    for length in range(len(prompt), len(prompt) + len(expected)):
        mask = case_mask(name, {"kind": "causal"}, length)
        last = torch.tensor([length - 1], device=at)
        with torch.no_grad():
            positions = torch.arange(length, device=at)
            inputs = ModelInputs(tokens[None], positions[None], ContextShard(mask), last, readout=LOGITS)
            logits = golden.stage(inputs)
        tokens = torch.cat([tokens, logits.argmax(-1)])
    return CaseResult(name, {"tokens": float((tokens[len(prompt) :].cpu() != expected).sum())})
