"""Golden cases: stored inputs, outputs, losses and gradients of public reference code, against this code.

A directory holds a Hugging Face checkpoint (config.json, model.safetensors), which is converted with its
certificate and loaded from there, and the cases (cases.json, cases.safetensors; described in the README.md
beside them). Everything is computed in fp32.
Legend: S positions, L tokens per sequence, B sequences, H hidden size, E experts, N supervised positions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import (
    BlockGrid,
    Denominator,
    DiffusionConfig,
    ModelConfig,
    Weight,
)
from llada_megatron.convert.config_json import architecture_of, model_config
from llada_megatron.convert.conversion import hf_to_mcore
from llada_megatron.convert.families import ExpertLayout, family_of
from llada_megatron.convert.loaded import gradients, load_model
from llada_megatron.data.packed import PackedSample
from llada_megatron.model.gpt import BlockDiffusionGPT
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.readout import LOGITS
from llada_megatron.objectives.autoregressive import autoregressive_batch
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.corruption import Corruption
from llada_megatron.objectives.diffusion import diffusion_inputs
from llada_megatron.objectives.weights import position_weights
from llada_megatron.record.json_files import read_json, require
from llada_megatron.runtime import device

TOLERANCES = {
    "mask": 0.0,  # entries that differ
    "routing": 0.0,  # pairs of token and layer with another set of experts
    "tokens": 0.0,  # greedy tokens that differ
    "logits": 1e-3,
    "hidden_states": 2e-4,
    "final_norm": 2e-4,
    "router_weights": 1e-4,
    "cross_entropy": 1e-3,
    "loss": 1e-5,  # relative, as are the two below
    "grad_norms": 1e-3,
    "gradients": 1e-3,
}
"""Largest difference by quantity; absolute unless said otherwise. Their basis is in the cases' README.md."""

DENOMINATORS = {
    "token": Denominator.tokens,
    "sequence": Denominator.sequence,
    "batch": Denominator.batch,
}
REMEDY = "give a directory of golden cases"
IGNORED = -100
UNSUPERVISED_PROMPT = 7
"""Labels that the next-token loss of case `causal` ignores; cases.json says so in words."""


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


@dataclass
class GoldenReport:
    """Every case of a directory, and what it holds that this version does not serve."""

    cases: list[CaseResult] = field(default_factory=list)
    not_served: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases)

    def worst(self) -> dict[str, float]:
        """The largest difference of each quantity over the cases."""
        found: dict[str, float] = {}
        for case in self.cases:
            for quantity, value in case.differences.items():
                found[quantity] = max(value, found.get(quantity, 0.0))
        return found


@dataclass
class Golden:
    """A directory's model and its stored cases."""

    architecture: str
    model: ModelConfig
    stage: BlockDiffusionGPT
    stored: dict[str, Tensor]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Stored tensors under `prefix.`, by the rest of their names."""
        return {
            name.removeprefix(f"{prefix}."): t
            for name, t in self.stored.items()
            if name.startswith(f"{prefix}.")
        }


def check(directory: Path) -> GoldenReport:
    """Run every case of a directory in this process, whose groups must hold one process.

    Raises BadInput when the directory lacks a file or its checkpoint cannot be read.
    """
    described = read_json(directory / "cases.json", REMEDY)
    require(described, directory / "cases.json", "mask_token_id", "cases", remedy=REMEDY)
    golden = load(directory, described["mask_token_id"])
    report = GoldenReport()
    report.cases += [mask_case(name, allowed) for name, allowed in golden.tensors("maskfn").items()]
    for name, case in described["cases"].items():
        report.cases.append(
            greedy_case(golden, name) if name == "greedy" else forward_case(golden, name, case)
        )
        if "loss_next_token" in case:
            report.cases.append(next_token_case(golden, name, case))
    for name, loss in described.get("losses", {}).items():
        if loss.get("confidence_beta", 0) or not loss.get("same_token_labels", True):
            report.not_served.append(name)
        else:
            report.cases.append(loss_case(golden, name, loss))
    report.not_served += [f"generation {name}" for name in described.get("generation", {})]
    return report


def load(directory: Path, mask_token_id: int) -> Golden:
    """Convert the directory's checkpoint, load the result in fp32, and read the cases."""
    try:
        stored = load_file(directory / "cases.safetensors")
    except (FileNotFoundError, SafetensorError) as error:
        raise BadInput(f"{directory}/cases.safetensors cannot be read ({error}): {REMEDY}.") from None
    longest = max(tensor.shape[-1] for name, tensor in stored.items() if name.endswith("input_ids"))
    described = read_json(directory / "config.json", REMEDY)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        hf_to_mcore(directory, checkpoint, mask_token_id=mask_token_id).require()
        model = model_config(described, mask_token_id, f"{directory}/config.json")
        stage = load_model(checkpoint, model, sequence_length=longest)
    return Golden(architecture_of(described), model, stage, stored)


def largest(difference: Tensor) -> float:
    """The largest magnitude; a huge one, which JSON can hold, if anything is not finite."""
    return float(difference.abs().nan_to_num(nan=torch.finfo(difference.dtype).max).max())


def relative(ours: Tensor | float, expected: Tensor | float) -> float:
    """|ours - expected| / |expected|, in the Euclidean norm for tensors."""
    ours, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (ours, expected))
    return largest((ours - expected).norm() / expected.norm())


def mask_case(name: str, allowed: Tensor) -> CaseResult:
    """The mask function alone; `name` is n{L}_bs{block size}."""
    length, block_size = (int(part.lstrip("nbs")) for part in name.split("_"))
    mask = BlockDiffusionMask([torch.tensor([0, length])], block_size)
    return CaseResult(f"maskfn {name}", {"mask": float((mask.dense() != allowed.bool()).sum())})


def case_mask(case: dict[str, Any], positions: int) -> BlockDiffusionMask:
    """The attention mask that a forward case describes."""
    kind = case["kind"]
    length = positions // 2 if kind == "bdlm" else positions
    lengths = case.get("doc_lens", [length])
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
def recorded(stage: BlockDiffusionGPT) -> Iterator[dict[str, list[Tensor]]]:
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
    for layer in stage.decoder.layers:
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
    stored = golden.tensors(name)
    S = len(stored["input_ids"])
    mask = case_mask(case, S)
    allowed = stored.get("attn_allowed", torch.ones(S, S)).bool()
    at = device.device()
    inputs = ModelInputs(
        tokens=stored["input_ids"][None].to(at),
        positions=stored["position_ids"][None].to(at),
        keys=ContextShard(mask),
        outputs=torch.arange(*case["logits_rows"], device=at),
        readout=LOGITS,
    )
    with torch.no_grad(), recorded(golden.stage) as seen:
        logits = golden.stage(inputs)
    ours = {
        "logits": logits,
        "hidden_states": torch.stack(seen["hidden_states"]),
        "final_norm": seen["final_norm"][0],
    }
    differences = {"mask": float((mask.dense() != allowed).sum())}
    differences |= {key: largest(ours[key].cpu() - stored[key]) for key in ours if key in stored}
    experts = stored["router_topk_idx"].long()
    weights = torch.stack(seen["weights"]).cpu()  # [MoE layers, S, E]
    chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, experts, True)
    expected = torch.zeros_like(weights).scatter(-1, experts, stored["router_topk_weight"])
    differences["routing"] = float((torch.stack(seen["chosen"]).cpu() != chosen).any(-1).sum())
    differences["router_weights"] = largest(weights - expected)
    return CaseResult(name, differences)


def greedy_case(golden: Golden, name: str) -> CaseResult:
    """Autoregressive continuation by argmax, the whole prefix computed again for each token."""
    prompt, expected = golden.stored[f"{name}.prompt"], golden.stored[f"{name}.output"]
    tokens, at = prompt.to(device.device()), device.device()
    for length in range(len(prompt), len(prompt) + len(expected)):
        mask = case_mask({"kind": "causal"}, length)
        last = torch.tensor([length - 1], device=at)
        with torch.no_grad():
            positions = torch.arange(length, device=at)
            inputs = ModelInputs(tokens[None], positions[None], ContextShard(mask), last, readout=LOGITS)
            logits = golden.stage(inputs)
        tokens = torch.cat([tokens, logits.argmax(-1)])
    return CaseResult(name, {"tokens": float((tokens[len(prompt) :].cpu() != expected).sum())})


def next_token_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """The next-token loss of autoregressive training, and its gradient's norm."""
    tokens = golden.stored[f"{name}.input_ids"].numpy()
    batch = autoregressive_batch([PackedSample(tokens, np.array([0, len(tokens)], dtype=np.int32))])
    batch.rows["weights"][: UNSUPERVISED_PROMPT - 1] = 0  # row i predicts token i + 1
    batch.counts = (int(batch.rows["weights"].sum()),)
    loss, _ = backward(golden.stage, [batch])
    norm = global_grad_norm(golden.stage)
    differences = {
        "loss": relative(loss, case["loss_next_token"]),
        "grad_norms": relative(norm, case["grad_norm_global"]),
    }
    return CaseResult(f"{name} next token", differences)


def loss_case(golden: Golden, name: str, loss: dict[str, Any]) -> CaseResult:
    """A diffusion loss through the project's own batches, weights and denominators, and its gradients."""
    stored = golden.tensors(f"loss.{name}")
    parts = [f"mb{k}." for k in range(loss["n_micro_batches"])] if "n_micro_batches" in loss else [""]
    batches = [micro_batch(golden, stored, part, loss) for part in parts]
    total, cross_entropies = backward(golden.stage, batches)
    expected = []
    for part in parts:
        supervised = stored[f"{part}noisy_input_ids"] == golden.model.mask_token_id
        expected.append(stored[f"{part}per_token_ce"][supervised])
    gradients = source_gradients(golden)
    global_norm = relative(global_grad_norm(golden.stage), loss["grad_norm_global"])
    norms = [relative(gradients[key].norm(), norm) for key, norm in loss.get("grad_norms", {}).items()]
    full = [relative(gradients[key], gradient) for key, gradient in golden.tensors(f"grad.{name}").items()]
    differences = {
        "cross_entropy": largest(torch.cat(cross_entropies).cpu() - torch.cat(expected)),
        "loss": relative(total, loss["total_loss"]),
        "grad_norms": max([global_norm, *norms]),
    }
    if full:
        differences["gradients"] = max(full)
    return CaseResult(name, differences)


def micro_batch(golden: Golden, stored: dict[str, Tensor], part: str, loss: dict[str, Any]) -> MicroBatch:
    """The stored ids as a micro-batch of training.

    dFactory's losses average over the masked tokens of a micro-batch. dllm's divide by maskable tokens or
    sequences and weigh with 1 / (t + 1e-6); here the weight is 1 / t, which stays within the tolerance.
    """
    clean, noisy, labels = (
        stored[f"{part}{key}"].numpy() for key in ("input_ids", "noisy_input_ids", "labels")
    )
    B, L = clean.shape
    masked, maskable = noisy == golden.model.mask_token_id, labels != IGNORED
    if "loss_norm_type" in loss:
        weight = Weight.inverse if loss["loss_weight_type"] == "scheduler" else Weight.flat
        diffusion = DiffusionConfig(weight=weight, denominator=DENOMINATORS[loss["loss_norm_type"]])
        rates = stored["t"].double().numpy()
    else:
        diffusion = DiffusionConfig(weight=Weight.flat, denominator=Denominator.masked)
        rates = np.ones(B)
    inputs = diffusion_inputs(
        [PackedSample(tokens, np.array([0, L], dtype=np.int32)) for tokens in clean],
        list(masked),
        block_size=loss["block_size"],
        grid=BlockGrid.sequence,
        mask_token_id=golden.model.mask_token_id,
    )
    weights, counts = zip(
        *(
            position_weights(Corruption(masked[b], np.full(L, rates[b])), diffusion, maskable[b])
            for b in range(B)
        ),
        strict=True,
    )
    return MicroBatch(
        inputs=inputs,
        rows={"weights": torch.from_numpy(np.stack(weights)[masked]).float()},
        counts=(sum(counts),),
    )


def backward(stage: BlockDiffusionGPT, batches: list[MicroBatch]) -> tuple[float, list[Tensor]]:
    """Mean over micro-batches of sum / count, and each one's cross entropies [N]; fills the gradients."""
    stage.zero_grad(set_to_none=True)
    total, cross_entropies = 0.0, []
    for batch in batches:
        batch = batch.to(device.device())
        cross_entropy = stage(batch.inputs)
        loss = (cross_entropy * batch.rows["weights"]).sum() / batch.counts[0] / len(batches)
        loss.backward()
        total += loss.item()
        cross_entropies.append(cross_entropy.detach())
    return total, cross_entropies


def global_grad_norm(stage: BlockDiffusionGPT) -> float:
    """Euclidean norm of all gradients; a parameter that nothing reached has none."""
    norms = [parameter.grad.double().norm() for parameter in stage.parameters() if parameter.grad is not None]
    return float(torch.stack(norms).norm())


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
