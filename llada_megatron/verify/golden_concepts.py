"""Golden cases of concepts: H-Net's chunking from its public code, and an independent derivation of DLCM's.

The samples of a case lie in one row, one after the other. Everything is computed in the dtype that is stored.
Legend: B samples, L tokens of each, T = B L, M concepts of all samples, H hidden size, n heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llada_megatron.config.errors import BadInput
from llada_megatron.model.concepts import (
    Segments,
    boundary_probability,
    opened,
    parser_loss,
    parser_slope,
    pooled_mean,
    smoothed,
)
from llada_megatron.model.cross_attention import attend, sight
from llada_megatron.verify.golden_cases import CaseResult, largest
from llada_megatron.verify.golden_set import REMEDY, Golden, Stored

CLAMP = 1e-4
"""H-Net's: its probabilities lie in [CLAMP, 1 - CLAMP] where concepts are smoothed."""


def hnet_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """Probabilities, boundaries, hidden states at boundaries, each token's smoothed concept, the loss."""
    stored = golden.stored.under(name)
    hidden_BLH = stored.needed("hidden")
    B, L, _ = hidden_BLH.shape
    starts, valid_T = torch.arange(0, B * L, L), stored.needed("valid").bool().flatten()
    p_T, opened_T = _boundaries(stored, stored, hidden_BLH, starts)
    opened_T &= valid_T
    segments = Segments(opened_T.numpy(), starts.numpy())
    first = torch.from_numpy(segments.first)
    is_chunk_BM = stored.needed("chunk_valid").bool()
    chunked_MH = stored.needed("chunked")[is_chunk_BM]
    dechunked_BLH, weight_M = stored.needed("dechunked"), p_T[first].clamp(CLAMP, 1 - CLAMP)
    parts = []
    for concepts_MH, a_M in zip(
        stored.needed("concepts"), weight_M.split(is_chunk_BM.sum(dim=1).tolist()), strict=True
    ):
        parts.append(smoothed(concepts_MH[: len(a_M)], a_M))
    mixed_TH = torch.cat(parts)[torch.from_numpy(segments.concept)]
    F, G = float(opened_T.double().mean()), float(p_T.double().mean())
    losses = [abs(parser_loss(F, G, float(R)) + 1 - of) for R, of in case["load_balancing_loss"].items()]
    differences = {
        "boundary_probability": largest(p_T - stored.like("boundary_prob", p_T.view(B, L)).flatten()),
        "boundaries": float((opened_T != stored.needed("boundary").bool().flatten()).sum()),
        "concepts": max(
            largest(hidden_BLH.flatten(0, 1)[first] - chunked_MH),
            largest((mixed_TH - dechunked_BLH.flatten(0, 1))[valid_T]),
        ),
        "parser": max(losses),
    }
    return CaseResult(name, differences)


def dlcm_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """Boundaries, means, smoothing, the loss of the parser, and what tokens see of concepts in both forms."""
    shared, mode = golden.stored.under("dlcm"), name.partition("_")[2]
    stored, hidden_BLH = shared.under(mode), shared.needed("hidden")
    document_BL = shared.needed("doc")
    B, L = document_BL.shape
    is_start_BL = torch.ones_like(document_BL, dtype=torch.bool)
    is_start_BL[:, 1:] = document_BL.diff(dim=1) != 0
    starts = is_start_BL.flatten().nonzero()[:, 0]
    p_T, opened_T = _boundaries(shared, shared, hidden_BLH, starts)
    if mode == "train":
        draws_T = shared.needed("uniform").flatten()
        opened_T = opened(shared.needed("p_sharp").flatten(), starts, draws_T)
    segments = Segments(opened_T.numpy(), starts.numpy())
    of_sample_BL = torch.from_numpy(segments.concept).view(B, L)
    counts = (of_sample_BL[:, -1] - of_sample_BL[:, 0] + 1).tolist()
    lengths_M = torch.from_numpy(segments.lengths)
    pooled_MH = pooled_mean(hidden_BLH.flatten(0, 1), of_sample_BL.flatten(), lengths_M)
    concepts_MC = _rows(stored.needed("Z"), counts)
    found = [largest(pooled_MH - _rows(stored.needed("pooled"), counts))]
    if "smoothed" in stored:
        weight_M = p_T[torch.from_numpy(segments.first)]
        found.append(largest(smoothed(concepts_MC, weight_M) - _rows(stored.needed("smoothed"), counts)))
    differences = {
        "boundary_probability": largest(p_T - shared.like("p", p_T.view(B, L)).flatten()),
        "boundaries": float((opened_T != shared.needed(f"b_{mode}").bool().flatten()).sum())
        + float((lengths_M != _rows(stored.needed("segment_length"), counts)).sum()),
        "concepts": max(found),
        "concept_attention": _attention(stored, case, hidden_BLH, concepts_MC, segments),
        "parser": _parser(case, mode, opened_T, p_T),
    }
    for shared_name in ("segment", "allowed", "lse", "attn_replicated_uncorrected"):
        stored.looked_at.add(f"dlcm.{mode}.{shared_name}")  # other words for what is compared
    return CaseResult(name, differences)


def table_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """The parser's loss at given (R, F, G)."""
    rows = case["rows"]
    return CaseResult(name, {"parser": max(abs(parser_loss(F, G, R) - loss) for R, F, G, loss in rows)})


def _boundaries(weights: Stored, stored: Stored, hidden_BLH: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    hidden_TH = hidden_BLH.flatten(0, 1)
    query, key = (hidden_TH @ weights.needed(each).T for each in ("w_q", "w_k"))
    p_T = boundary_probability(query, key, starts)
    return p_T, opened(p_T, starts)


def _rows(padded_BM: Tensor, counts: list[int]) -> Tensor:
    """The samples' entries in one row, without padding."""
    if padded_BM.dim() < 2 or len(padded_BM) != len(counts) or max(counts) > padded_BM.shape[1]:
        raise BadInput(f"cases.safetensors holds concepts that its boundaries do not make: {REMEDY}.")
    return torch.cat([sample[:count] for sample, count in zip(padded_BM, counts, strict=True)])


def _attention(
    stored: Stored, case: dict[str, Any], hidden_BLH: Tensor, concepts_MC: Tensor, segments: Segments
) -> float:
    n, eps = case["heads"], case["eps"]

    def heads(rows: Tensor, weight: str) -> Tensor:
        return (rows @ stored.needed(weight).T).unflatten(-1, (n, -1))[:, None]

    def normed(rows: Tensor, weight: str) -> Tensor:
        return torch.nn.functional.rms_norm(rows, rows.shape[-1:], stored.needed(weight), eps)

    query = normed(heads(hidden_BLH.flatten(0, 1), "w_Q"), "norm_q")
    known = torch.cat([stored.needed("z_start")[None], concepts_MC])
    worst = 0.0
    for replicated, expected in ((False, "attn_strict"), (True, "attn_replicated_corrected")):
        seen = sight(segments, own=False, replicated=replicated)
        keys = known[torch.from_numpy(seen.entry)]
        output = attend(query, normed(heads(keys, "w_K"), "norm_k"), heads(keys, "w_V"), seen, "reference")
        worst = max(worst, largest(output[:, 0] - stored.needed(expected).flatten(0, 1)))
    return worst


def _parser(case: dict[str, Any], mode: str, opened_T: Tensor, p_T: Tensor) -> float:
    F, G = float(opened_T.double().mean()), float(p_T.double().mean())
    worst = 0.0
    for name, expected in case["aux"].items():
        R = float(name.removeprefix(f"{mode}_R"))
        ours = (parser_loss(F, G, R), parser_slope(F, R))
        worst = max(worst, *(abs(a - expected[b]) for a, b in zip(ours, ("global_aux", "dG"), strict=True)))
    return worst
