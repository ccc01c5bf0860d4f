"""Golden likelihoods of answers: LLaDA's Monte-Carlo form, of full attention, over stored masks.

    log p(answer | prompt) ~ - mean over draws of A / |M| sum over i in M of CE_i

With guidance of scale s the logits are without + (s + 1) (with - without), where `without` is without the
prompt, masked like the rest; `llada eval` does not guide.

Legend: D draws, A tokens of the answer, L of prompt and answer, V vocabulary, N masked positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid, DiffusionConfig
from llada_megatron.data.packed import PackedSample
from llada_megatron.evaluate.continuation import Pair, Scorer
from llada_megatron.model.readout import LOGITS
from llada_megatron.objectives.diffusion import diffusion_inputs
from llada_megatron.runtime import device
from llada_megatron.verify.golden_cases import CaseResult, largest, relative
from llada_megatron.verify.golden_losses import diffusion_objective
from llada_megatron.verify.golden_set import REMEDY, Golden


def likelihood_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """Cross entropies, the estimate of each draw and mini-batch, and the likelihood."""
    stored = golden.stored.under(name)
    prompt, answer = (stored.ids(key, golden.model.vocab_size) for key in ("prompt", "answer"))
    mask_DA = stored.needed("mask").bool()
    if mask_DA.dim() != 2 or mask_DA.shape[1:] != answer.shape or not mask_DA.any(dim=1).all():
        raise BadInput(f"cases.safetensors holds a {name}.mask that is not of draws and tokens: {REMEDY}.")
    if type(case["log_likelihood"]) not in (int, float) or len(mask_DA) % (case["batch_size"] or 1):
        raise BadInput(f"cases.json/{name} has a log_likelihood or batch_size that cannot be: {REMEDY}.")
    count_D, A = mask_DA.sum(dim=1), len(answer)
    is_stored_rate_D = (stored.like("p_mask", count_D) - count_D / A).abs() < 1e-6
    ce_DA = _cross_entropies(golden, prompt, answer, mask_DA, case["cfg_scale"])
    per_draw_D = ce_DA.sum(dim=1) * A / count_D
    per_batch = per_draw_D.view(-1, int(case["batch_size"] or 1)).mean(dim=1)
    bounds = [
        relative(per_draw_D, stored.like("per_sample", per_draw_D)),
        relative(per_batch, stored.like("per_batch_loss", per_batch)),
        relative(-per_draw_D.mean(), case["log_likelihood"]),
    ]
    if not case["cfg_scale"]:
        bounds.append(relative(_scored(golden, prompt, answer, mask_DA), case["log_likelihood"]))
    differences = {
        "mask": float((~is_stored_rate_D).sum()),
        "cross_entropy": largest(ce_DA - stored.like("ce", ce_DA)),
        "bound": max(bounds),
    }
    return CaseResult(name, differences)


def _scored(golden: Golden, prompt: Tensor, answer: Tensor, mask_DA: Tensor) -> float:
    """What `llada eval` makes of it with these masks."""
    is_masked_DA = mask_DA.numpy()

    def mask(
        seed: int, number: int, draw: int, draws: int, starts: np.ndarray, scored: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        masked = np.zeros(len(scored), dtype=bool)
        masked[scored] = is_masked_DA[draw]
        return masked, masked * scored.sum() / masked.sum()

    config = diffusion_objective(golden, DiffusionConfig()).config
    whole = len(prompt) + len(answer)
    scorer = Scorer(config, golden.stage, whole, draws=len(mask_DA), mask=mask)
    (found,) = scorer.run([Pair(0, prompt.numpy(), answer.numpy())])
    return found.nats


@torch.no_grad()
def _cross_entropies(golden: Golden, prompt: Tensor, answer: Tensor, mask_DA: Tensor, scale: float) -> Tensor:
    """float64 [D, A], zero where nothing is masked."""
    D, L = len(mask_DA), len(prompt) + len(answer)
    sample = PackedSample(torch.cat([prompt, answer]).numpy(), np.array([0, L], dtype=np.int32))
    inputs = diffusion_inputs(
        [sample] * D,
        [np.concatenate([np.zeros(len(prompt), dtype=bool), row]) for row in mask_DA.numpy()],
        block_size=L,
        grid=BlockGrid.sequence,
        mask_token_id=golden.model.mask_token_id,
    )
    is_answer_L = torch.arange(L) >= len(prompt)
    without = inputs.tokens.where(is_answer_L, golden.model.mask_token_id)
    inputs = replace(inputs, readout=LOGITS).map(lambda tensor: tensor.to(device.device()))
    inputs.keys.to(device.device())
    logits_NV = golden.stage(inputs).double()
    if scale:
        without_NV = golden.stage(replace(inputs, tokens=without.to(logits_NV.device))).double()
        logits_NV = without_NV + (scale + 1) * (logits_NV - without_NV)
    assert inputs.labels is not None
    ce_DA = torch.zeros(mask_DA.shape, dtype=torch.float64)
    ce_DA[mask_DA] = torch.nn.functional.cross_entropy(logits_NV, inputs.labels, reduction="none").cpu()
    return ce_DA
