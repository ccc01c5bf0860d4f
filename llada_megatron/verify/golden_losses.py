"""Losses that golden cases store, and their gradients, through this project's objectives.

Legend: L tokens per sequence, B sequences, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llada_megatron.config.errors import BadInput
from llada_megatron.config.rules import schedule_of
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import (
    ConfidenceConfig,
    Config,
    DataConfig,
    Denominator,
    DiffusionConfig,
    PreferenceConfig,
    ScheduleConfig,
    StageConfig,
    Weight,
)
from llada_megatron.convert.families import ExpertLayout, family_of
from llada_megatron.convert.loaded import gradients
from llada_megatron.data.packed import PackedSample
from llada_megatron.model.gpt import BlockDiffusionStage, layers_of
from llada_megatron.objectives import passes
from llada_megatron.objectives.autoregressive import Autoregressive, autoregressive_batch
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.confidence import Confidence
from llada_megatron.objectives.corruption import Corruption
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.objective import Objective
from llada_megatron.objectives.preference import Preference
from llada_megatron.runtime import device
from llada_megatron.verify.golden_cases import CaseResult, largest, relative
from llada_megatron.verify.golden_set import REMEDY, Golden, Stored

DENOMINATORS = {
    "token": Denominator.tokens,
    "sequence": Denominator.sequence,
    "batch": Denominator.batch,
}
WEIGHTS = {"scheduler": Weight.inverse, "uniform": Weight.flat}
OVER_MASKED = DiffusionConfig(weight=Weight.flat, denominator=Denominator.masked)
"""dFactory's losses: the mean over the masked tokens of a micro-batch."""
IGNORED = -100
UNSUPERVISED_PROMPT = 7
"""Labels that the next-token loss of case `causal` ignores; cases.json says so in words."""


def next_token_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """The next-token loss of autoregressive training, and its gradient's norm."""
    tokens = golden.stored.under(name).ids("input_ids", golden.model.vocab_size).numpy()
    batch = autoregressive_batch([PackedSample(tokens, np.array([0, len(tokens)], dtype=np.int32))])
    batch.rows["weights"][: UNSUPERVISED_PROMPT - 1] = 0  # row i predicts token i + 1
    batch.counts = (int(batch.rows["weights"].sum()),)
    objective = Autoregressive("autoregressive", *_settings(golden))
    loss, _ = backward(golden.stage, objective, [batch])
    differences = {"loss": relative(loss, case["loss_next_token"])}
    if "grad_norm_global" in case:
        differences["grad_norms"] = relative(global_grad_norm(golden.stage), case["grad_norm_global"])
    return CaseResult(f"{name} next token", differences)


def loss_case(golden: Golden, name: str, loss: dict[str, Any]) -> CaseResult:
    """A diffusion loss through the project's own batches, weights and denominators, and its gradients."""
    stored = golden.stored.under(f"loss.{name}")
    parts = [f"mb{k}." for k in range(loss["n_micro_batches"])] if "n_micro_batches" in loss else [""]
    objective = _objective(golden, loss)
    batches = [_stored_batch(golden, objective, stored, part, loss) for part in parts]
    total, outputs = backward(golden.stage, objective, batches)
    whole = golden.stored.under(f"grad.{name}")
    ours = source_gradients(golden) if len(whole) else {}
    norms = norm_differences(golden, loss)
    found = {
        "cross_entropy": [
            _cross_entropies(golden, stored, part, output if output.dim() == 1 else output[:, 0])
            for part, output in zip(parts, outputs, strict=True)
            if f"{part}per_token_ce" in stored
        ],
        "loss": [relative(total, loss["total_loss"])] if "total_loss" in loss else [],
        "grad_norms": [norms] if norms is not None else [],
        "gradients": [relative(ours[key], whole.like(key, ours[key])) for key in whole if key in ours],
    }
    return CaseResult(name, {quantity: max(values) for quantity, values in found.items() if values})


def _objective(golden: Golden, loss: dict[str, Any]) -> Diffusion:
    """dFactory's losses average over masked tokens. dllm's divide by maskable tokens or sequences and weigh
    with 1 / (t + 1e-6); here the weight is 1 / t, which stays within the tolerance.
    """
    diffusion = OVER_MASKED
    if "loss_norm_type" in loss:
        weight, denominator = WEIGHTS[loss["loss_weight_type"]], DENOMINATORS[loss["loss_norm_type"]]
        diffusion = DiffusionConfig(weight=weight, denominator=denominator)
    if beta := loss.get("confidence_beta"):
        return confidence_objective(golden, diffusion, ConfidenceConfig(weight=beta))
    return diffusion_objective(golden, diffusion)


def diffusion_objective(golden: Golden, diffusion: DiffusionConfig) -> Diffusion:
    """The objective of SFT and of pretraining."""
    return Diffusion("diffusion", *_settings(golden, diffusion=diffusion))


def confidence_objective(
    golden: Golden, diffusion: DiffusionConfig, confidence: ConfidenceConfig
) -> Confidence:
    """The objective of CAP."""
    return Confidence("confidence", *_settings(golden, diffusion=diffusion, confidence=confidence))


def preference_objective(golden: Golden, preference: PreferenceConfig) -> Preference:
    """The objective of DPO and KTO."""
    return Preference("preference", *_settings(golden, preference=preference))


def _settings(golden: Golden, **sections: Any) -> tuple[Config, Schedule]:
    """Of a run of a single stage, which no case asks for anything: batches come from what is stored."""
    stage = StageConfig(name="golden", block_size="full", tokens=1)
    data = DataConfig(sequence_length=golden.longest)
    config = Config(model=golden.model, data=data, schedule=ScheduleConfig(stages=[stage]), **sections)
    return config, schedule_of(config)


def _cross_entropies(golden: Golden, stored: Stored, part: str, ours_N: Tensor) -> float:
    noisy = stored[f"{part}noisy_input_ids"]
    expected = stored.like(f"{part}per_token_ce", noisy)[noisy == golden.model.mask_token_id]
    return largest(ours_N.cpu() - expected)


def _stored_batch(
    golden: Golden, objective: Diffusion, stored: Stored, part: str, loss: dict[str, Any]
) -> MicroBatch:
    clean, noisy = (
        stored.ids(f"{part}{key}", golden.model.vocab_size) for key in ("input_ids", "noisy_input_ids")
    )
    labels = stored.needed(f"{part}labels")
    rates = stored.needed("t").double().numpy() if "loss_norm_type" in loss else None
    return masked_batch(golden, objective, clean, noisy, labels, loss["block_size"], rates=rates)


def masked_batch(
    golden: Golden,
    objective: Diffusion,
    clean: Tensor,
    noisy: Tensor,
    labels: Tensor,
    block_size: int,
    *,
    maskable: np.ndarray | None = None,
    edges: list[list[int]] | None = None,
    rates: np.ndarray | None = None,
) -> MicroBatch:
    """Stored ids, int64 [B, L] each, as a micro-batch of training, read out as the objective asks.

    labels: the token to predict where one is masked, which need not be the clean one. maskable: bool [B, L],
    by default where there is a label; edges: where each sequence's documents start, then L, by default one
    document; rates: [B], by default 1. Raises BadInput for ids that do not belong together.
    """
    if not clean.shape == noisy.shape == labels.shape or clean.ndim != 2:
        raise BadInput(f"cases.safetensors holds ids and labels of a loss that are not all [B, L]: {REMEDY}.")
    B, L = clean.shape
    is_masked = noisy == golden.model.mask_token_id
    wanted = labels[is_masked]
    if not torch.equal(noisy[~is_masked], clean[~is_masked]):
        raise BadInput(f"cases.safetensors holds noisy ids that are neither clean nor the mask: {REMEDY}.")
    if len(wanted) and not 0 <= wanted.min() <= wanted.max() < golden.model.vocab_size:
        raise BadInput(f"cases.safetensors holds labels of masked tokens that are no tokens: {REMEDY}.")
    masked = is_masked.numpy()
    maskable = (labels != IGNORED).numpy() if maskable is None else maskable
    edges = edges or [[0, L]] * B
    rates = np.ones(B) if rates is None else rates
    batch = objective.corrupted(
        [
            PackedSample(clean[b].numpy(), np.array(edges[b], dtype=np.int32), supervised=maskable[b])
            for b in range(B)
        ],
        [Corruption(masked[b], np.full(L, rates[b])) for b in range(B)],
        block_size,
    )
    batch.inputs.labels = wanted
    return batch


def read_out(stage: BlockDiffusionStage, objective: Objective, batch: MicroBatch) -> Tensor:
    """What the objective's readout gives for the N rows."""
    batch.inputs.readout = objective.readout
    return stage(batch.inputs)


def backward(
    stage: BlockDiffusionStage, objective: Objective, batches: list[MicroBatch], share: float | None = None
) -> tuple[float, list[Tensor]]:
    """The sum of the micro-batches' losses, each a global batch of its own, times `share` (default: their
    mean), and what was read out [N] or [N, columns]; fills the gradients.
    """
    stage.zero_grad(set_to_none=True)
    share = 1 / len(batches) if share is None else share
    total, outputs = 0.0, []
    for batch in batches:
        batch = batch.to(device.device())
        output = read_out(stage, objective, batch)
        loss, count, _ = passes.reduced(objective, None, batch, output)
        loss = loss / count.clamp(min=1) * share
        loss.backward()
        total += loss.item()
        outputs.append(output.detach())
    return total, outputs


@contextmanager
def as_differentiated(golden: Golden, case: dict[str, Any]) -> Iterator[None]:
    """Take gradients as the case did: public code in eval mode runs its routed experts without any.

    Such a case stores null for the norm of a routed expert.
    """
    norms = case.get("grad_norms", {})
    constant = any(norm is None and ".experts." in name for name, norm in norms.items())
    handles = [
        layer.mlp.experts.register_forward_hook(_without_gradient)
        for layer in layers_of(golden.stage)
        if constant and hasattr(layer.mlp, "experts")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_gradient(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor | None]) -> Any:
    return output[0].detach(), *output[1:]


def global_grad_norm(stage: BlockDiffusionStage) -> float:
    """Euclidean norm of all gradients; a parameter that nothing reached has none."""
    norms = [parameter.grad.double().norm() for parameter in stage.parameters() if parameter.grad is not None]
    return float(torch.stack(norms).norm())


def norm_differences(golden: Golden, case: dict[str, Any]) -> float | None:
    """The largest difference of the norms that a case stores; None where it stores none of our parameters.

    A parameter that nothing reached has the norm null there and zero here.
    """
    ours = source_gradients(golden)
    norms = case.get("grad_norms", {})
    found = [relative(ours[key].norm(), norm or 0.0) for key, norm in norms.items() if key in ours]
    if "grad_norm_global" in case:
        found.append(relative(global_grad_norm(golden.stage), case["grad_norm_global"]))
    return max(found, default=None)


def source_gradients(golden: Golden) -> dict[str, Tensor]:
    """Gradients under the Hugging Face checkpoint's names and shapes: conversions only move numbers about."""
    ours = gradients(golden.stage)
    found: dict[str, Tensor] = {}
    for entry in family_of(golden.architecture, "config.json").table(golden.model, ExpertLayout.separate):
        if (part := entry.ours).name in ours:  # expert_bias is no parameter
            at = tuple(slice(first, first + size) for first, size in zip(part.offset, part.size, strict=True))
            names = (source.name for source in entry.theirs)
            found |= zip(names, entry.to_theirs([ours[part.name][at]]), strict=True)
    return found
