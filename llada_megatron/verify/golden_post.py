"""Golden cases of CAP, SFT, preferences over the likelihood bound, likelihoods, and BD3-LM.

In such a set a case belongs to a `group`, and cases of a group share tensors; the README.md beside them says
which. All masks and weights are stored.

Legend: L tokens per sequence, B sequences, N masked positions, D draws, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import (
    BlockGrid,
    ConfidenceConfig,
    Denominator,
    DiffusionConfig,
    PreferenceConfig,
    PreferenceForm,
    Weight,
)
from llada_megatron.data.packed import PackedSample
from llada_megatron.data.packing import quantised
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.diffusion import Diffusion, diffusion_inputs
from llada_megatron.objectives.preference import SIDES, Preference, bounds, preference_losses
from llada_megatron.record.json_files import require
from llada_megatron.runtime import device
from llada_megatron.verify import golden_concepts
from llada_megatron.verify.golden_bd3lm import bd3lm_case, search_case
from llada_megatron.verify.golden_cases import CaseResult, largest, relative
from llada_megatron.verify.golden_likelihood import likelihood_case
from llada_megatron.verify.golden_losses import (
    OVER_MASKED,
    as_differentiated,
    backward,
    confidence_objective,
    diffusion_objective,
    masked_batch,
    norm_differences,
    preference_objective,
    read_out,
)
from llada_megatron.verify.golden_set import REMEDY, Golden, Stored

POLICY = "dpo.policy"
SIDE_NAMES = ("chosen", "rejected")
BY_REALISED_RATE = DiffusionConfig(weight=Weight.inverse, denominator=Denominator.tokens)


def check_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult | str:
    """A case of one of GROUPS against this project's code, or why it is not served.

    Raises BadInput where it lacks something that it cannot be computed without.
    """
    group = GROUPS[case["group"]]
    if (reason := group.unserved(case)) is not None:
        return f"{name} ({reason})"
    where = Path("cases.json") / name
    require(case, where, *group.needs, remedy=REMEDY)
    for key in NUMBERS:
        value = case.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        if (key in group.needs or value is not None) and not is_number:
            raise BadInput(f"{where} has {key} {value!r}, which is no number >= 0: {REMEDY}.")
    return group.check(golden, name, case)


def cap_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """dFactory's form: temperature 1, both means over one micro-batch."""
    stored, vocabulary = golden.stored.under("cap"), golden.model.vocab_size
    clean, noisy = (stored.ids(key, vocabulary) for key in ("input_ids", "noisy_input_ids"))
    labels = stored.needed(f"labels.{case['labels']}")
    confidence = ConfidenceConfig(weight=case["confidence_beta"])
    objective = confidence_objective(golden, OVER_MASKED, confidence)
    batch = masked_batch(golden, objective, clean, noisy, labels, case["block_size"])
    with as_differentiated(golden, case):
        total, (output,) = backward(golden.stage, objective, [batch])
    output = output.cpu()
    is_masked = noisy == golden.model.mask_token_id
    expected = {
        "cross_entropy": stored.like(f"ce.{case['labels']}", noisy)[is_masked],
        "entropy": stored.like("entropy", noisy)[is_masked],
        "right": (stored.like("argmax", noisy) == labels)[is_masked].float(),
    }
    differences = {
        key: largest(output[:, column] - value) for column, (key, value) in enumerate(expected.items())
    }
    differences["right"] = float((output[:, 2] != expected["right"]).sum())
    weighted = case["confidence_beta"] * case["confidence_loss"]
    differences["loss"] = max(
        relative(total, case["total_loss"]),
        *_term_differences(objective, batch, output, (case["consistency_loss"], weighted)),
    )
    return _with_norms(golden, name, case, differences)


def complementary_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """diffusers' form: the losses of both views added, a temperature, the mask token never given."""
    stored, vocabulary = golden.stored.under("pair"), golden.model.vocab_size
    weight, temperature = case["lambda_conf"], case["temperature"]
    objective = confidence_objective(
        golden,
        DiffusionConfig(weight=Weight.flat, denominator=Denominator.masked, gives_mask_token=False),
        ConfidenceConfig(weight=weight, temperature=temperature),
    )
    clean = stored.ids("input_ids", vocabulary)
    attended = stored.like("attention_mask", clean).bool()
    views, batches, mask = ("", "_rev"), [], 0
    for view in views:
        noisy = stored.ids(f"noisy{view}", vocabulary)
        labels = stored.needed(f"labels{view}")
        edges = _documents(attended)
        batches.append(masked_batch(golden, objective, clean, noisy, labels, clean.shape[-1], edges=edges))
        is_masked = noisy == golden.model.mask_token_id
        mask += int((is_masked != stored.like(f"masked{view}", noisy).bool()).sum())
    with as_differentiated(golden, case):
        total, outputs = backward(golden.stage, objective, batches, share=1)
    losses = [relative(total, case["total"])]
    right = 0.0
    for view, batch, output in zip(views, batches, outputs, strict=True):
        expected = (case[f"loss_sft{view}"], weight * case[f"loss_conf{view}"])
        losses += _term_differences(objective, batch, output, expected)
        right += abs(float(output[:, 2].sum()) - case[f"n_correct{view}"])
    return _with_norms(golden, name, case, {"mask": float(mask), "right": right, "loss": max(losses)})


def sft_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """Every sequence a step of its own: the mean over masked tokens, and the sum by 1/t of the rate that came
    about over the answer's tokens, which is the same.

    A sequence of nothing but a prompt has no loss there, and adds nothing here.
    """
    sequences = case["per_sequence"]
    if not isinstance(sequences, list) or not all(isinstance(each, dict | None) for each in sequences):
        raise BadInput(f"cases.json/{name} has a per_sequence that is no list of objects: {REMEDY}.")
    raw, wanted, prompts = (
        _numbers(name, case, key, len(sequences)).long().numpy()
        for key in ("raw_lengths", "quantised_lengths", "prompt_lengths")
    )
    lengths = quantised(raw, case["block_size"])
    found: dict[str, list[float]] = {"lengths": [float((lengths != wanted).sum())]}
    for index, (prompt, expected) in enumerate(zip(prompts.tolist(), sequences, strict=True)):
        stored = golden.stored.under(f"{name}.seq{index}")
        for quantity, value in _sequence(golden, stored, case["block_size"], prompt, expected).items():
            found.setdefault(quantity, []).append(value)
    return CaseResult(name, {quantity: max(values) for quantity, values in found.items()})


def _sequence(
    golden: Golden, stored: Stored, block_size: int, prompt: int, expected: dict[str, Any] | None
) -> dict[str, float]:
    clean, noisy = (
        stored.ids(key, golden.model.vocab_size)[None] for key in ("input_ids", "noisy_input_ids")
    )
    maskable = (torch.arange(clean.shape[-1]) >= prompt)[None].numpy()
    is_masked = noisy == golden.model.mask_token_id
    flat, by_rate = (diffusion_objective(golden, form) for form in (OVER_MASKED, BY_REALISED_RATE))
    batch, weighted = (
        masked_batch(
            golden,
            objective,
            clean,
            noisy,
            stored.needed("labels")[None],
            block_size,
            maskable=maskable,
            rates=is_masked.numpy().sum(axis=1) / maskable.sum(axis=1).clip(min=1),
        )
        for objective in (flat, by_rate)
    )
    with as_differentiated(golden, expected or {}):
        total, (output,) = backward(golden.stage, flat, [batch])
    if expected is None:
        return {"loss": abs(total)}
    differences = {
        "cross_entropy": largest(output.cpu() - stored.like("per_token_ce", noisy[0])[is_masked[0]]),
        "loss": max(
            relative(total, expected["loss"]),
            *_term_differences(by_rate, weighted, output, (expected["weighted_by_realised_rate"],)),
        ),
    }
    norms = norm_differences(golden, expected)
    return differences if norms is None else differences | {"grad_norms": norms}


def dpo_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """The bounds of policy and reference over stored masks, and the loss of their differences."""
    vocabulary = golden.model.vocab_size
    tokens = torch.stack([golden.stored.ids(f"dpo.{side}", vocabulary) for side in SIDE_NAMES], dim=1)
    stored = golden.stored.under(name)
    draws, pairs = len(stored.needed("mask_chosen")), len(tokens)
    settings = PreferenceConfig(beta=case["beta"], draws=draws, sft_weight=0)
    objective = preference_objective(golden, settings)
    of_reference = "" if case["masks_shared_policy_reference"] else "ref_"
    batch, reference = (
        bound_batch(
            golden,
            tokens,
            _both_sides(stored, f"mask_{of}").bool(),
            _both_sides(stored, f"weight_{of}").double(),
            case.get("block_size"),
        )
        for of in ("", of_reference)
    )
    is_reference = str(case.get("policy", "")).startswith("unmodified")
    policy = golden if is_reference else golden.altered(POLICY)
    of_known = scored(golden, objective, batch, reference)
    with as_differentiated(policy, case):
        total, (output,) = backward(policy.stage, objective, [batch])
    ours, known = bounds(batch, output).cpu().mean(dim=0), batch.whole["reference"].cpu().mean(dim=0)
    margin = settings.beta * ((ours - known)[:, 0] - (ours - known)[:, 1])
    log_p = {
        model: _both_sides(stored, f"logp_{model}_")[_both_sides(stored, f"mask_{of}").bool()]
        for model, of in (("policy", ""), ("ref", of_reference))
    }
    differences = {
        "cross_entropy": max(largest(output.cpu() + log_p["policy"]), largest(of_known + log_p["ref"])),
        "bound": max(
            relative(bound[:, side], stored.like(f"elbo_{model}_{SIDE_NAMES[side]}", bound[:, side]))
            for model, bound in (("policy", ours), ("ref", known))
            for side in range(SIDES)
        ),
        "preference": max(
            relative(total, case["loss"]),
            relative(preference_losses(ours - known, settings), _numbers(name, case, "per_pair_loss", pairs)),
            relative(margin, stored.like("margin", margin)),
        ),
    }
    return _with_norms(policy, name, case, differences)


def _both_sides(stored: Stored, prefix: str) -> Tensor:
    """Stored per draw and pair, [D, P, 2, L]."""
    return torch.stack([stored.needed(f"{prefix}{side}") for side in SIDE_NAMES], dim=2)


def kto_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """Texts that are wanted and unwanted in turn, as the chosen and the rejected of our pairs."""
    stored = golden.stored.under("kto")
    tokens = stored.ids("input_ids", golden.model.vocab_size)
    texts, L = tokens.shape
    masks = stored.needed("masks").bool()
    draws = len(masks)
    lengths = _numbers(name, case, "completion_lengths", texts)
    weights = (lengths / stored.like("l_values", masks.sum(dim=-1).T).T)[..., None].expand(masks.shape)
    paired = (draws, texts // SIDES, SIDES, L)
    settings = PreferenceConfig(form=PreferenceForm.kto, beta=case["beta"], draws=draws, sft_weight=0)
    objective = preference_objective(golden, settings)
    batch = bound_batch(golden, tokens.view(*paired[1:]), masks.view(paired), weights.reshape(paired), None)
    scored(golden, objective, batch, batch)
    policy = golden.altered(POLICY)
    with as_differentiated(policy, case):
        total, (output,) = backward(policy.stage, objective, [batch])
    by_draw = bounds(batch, output).cpu().view(draws, texts)
    of_reference = batch.whole["reference"].cpu().view(draws, texts).mean(dim=0)
    differences = {
        "bound": max(
            relative(by_draw, stored.like("B_policy_per_draw", by_draw)),
            relative(of_reference, stored.like("B_ref", of_reference)),
        ),
        "preference": relative(total, case["loss"]),
    }
    return _with_norms(policy, name, case, differences)


def bound_batch(
    golden: Golden, tokens: Tensor, masks: Tensor, weights: Tensor, block_size: int | None
) -> MicroBatch:
    """A micro-batch of objective `preference` of stored masks.

    tokens: int64 [P, 2, L]; masks bool and weights float64 [D, P, 2, L]; block_size None: the sequence.
    """
    if masks.shape != weights.shape or masks.shape[1:] != tokens.shape:
        raise BadInput(f"cases.safetensors holds masks, weights and ids of other shapes: {REMEDY}.")
    D, P, _, L = masks.shape
    flat = masks.reshape(-1, L).numpy()
    inputs = diffusion_inputs(
        [
            PackedSample(text, np.array([0, L], dtype=np.int32))
            for text in tokens.expand(D, -1, -1, -1).reshape(-1, L).numpy()
        ],
        list(flat),
        block_size=block_size or L,
        grid=BlockGrid.sequence,
        mask_token_id=golden.model.mask_token_id,
    )
    rows = {
        "weights": weights[masks],
        "slot": torch.from_numpy(np.repeat(np.arange(len(flat)), flat.sum(axis=1))),
    }
    whole = {"reference": torch.zeros(D, P, SIDES, dtype=torch.float64)}
    return MicroBatch(inputs, rows, (P, P * L), whole)  # the second count has the weight 0


def scored(golden: Golden, objective: Preference, batch: MicroBatch, reference: MicroBatch) -> Tensor:
    """Put the reference model's bounds of the masks of `reference` into `batch`; returns its readout [N]."""
    reference = reference.to(device.device())
    with torch.no_grad():
        output = read_out(golden.stage, objective, reference)
    batch.whole["reference"] = bounds(reference, output).cpu()
    return output.cpu()


def _documents(attended: Tensor) -> list[list[int]]:
    """Edges of the documents of sequences whose last tokens, bool [B, L], are padding that nobody sees."""
    L = attended.shape[-1]
    valid = attended.sum(dim=-1).tolist()
    if any(not attended[b, :n].all() or not n for b, n in enumerate(valid)):
        raise BadInput(f"cases.safetensors holds an attention_mask that hides more than an end: {REMEDY}.")
    return [[0, n] if n == L else [0, n, L] for n in valid]


def _term_differences(
    objective: Diffusion, batch: MicroBatch, output: Tensor, expected: tuple[float, ...]
) -> list[float]:
    """Of every term of a loss that is a step of its own."""
    loss = objective.loss(batch.to(output.device), output)
    terms = [float(total) / max(int(count), 1) for total, count in zip(loss.sums, loss.counts, strict=True)]
    return [relative(ours, value) for ours, value in zip(terms, expected, strict=True)]


def _with_norms(golden: Golden, name: str, case: dict[str, Any], differences: dict[str, float]) -> CaseResult:
    norms = norm_differences(golden, case)
    key = "preference_norms" if "preference" in differences else "grad_norms"
    return CaseResult(name, differences if norms is None else differences | {key: norms})


def _numbers(name: str, case: dict[str, Any], key: str, count: int) -> Tensor:
    """float64 [count] of a case's list; BadInput for anything else."""
    values = case[key]
    if not isinstance(values, list) or len(values) != count or {*map(type, values)} - {int, float}:
        raise BadInput(f"cases.json/{name} has a {key} that is no list of {count} numbers: {REMEDY}.")
    return torch.tensor(values, dtype=torch.float64)


def _kto_unserved(case: dict[str, Any]) -> str | None:
    if case.get("z0_mode") != "zero":
        return f"z0 {case.get('z0_mode')}"
    desirable = case.get("desirable", [])
    if (case.get("lambda_D"), case.get("lambda_U")) != (1, 1) or desirable != [1, 0] * (len(desirable) // 2):
        return "wanted and unwanted texts that are no pairs"
    return None


@dataclass(frozen=True)
class Group:
    """How the cases of a group are checked, and the keys that each of them needs."""

    check: Callable[[Golden, str, dict[str, Any]], CaseResult]
    needs: tuple[str, ...]
    unserved: Callable[[dict[str, Any]], str | None] = lambda case: None


NUMBERS = (
    *("confidence_beta", "lambda_conf", "temperature", "beta", "block_size", "batch_size", "cfg_scale"),
    *("mask_rate_min", "mask_rate_max", "loss", "total", "total_loss", "consistency_loss", "confidence_loss"),
    *("loss_sft", "loss_conf", "n_correct", "loss_sft_rev", "loss_conf_rev", "n_correct_rev"),
)
GROUPS = {
    "cap_dfactory": Group(
        cap_case,
        ("labels", "block_size", "confidence_beta", "total_loss", "consistency_loss", "confidence_loss"),
    ),
    "cap_diffusers_complementary": Group(
        complementary_case,
        (
            *("lambda_conf", "temperature", "total"),
            *("loss_sft", "loss_conf", "n_correct", "loss_sft_rev", "loss_conf_rev", "n_correct_rev"),
        ),
        lambda case: None if "total" in case else "described in words alone",
    ),
    "sft": Group(
        sft_case, ("block_size", "raw_lengths", "quantised_lengths", "prompt_lengths", "per_sequence")
    ),
    "dpo": Group(dpo_case, ("beta", "loss", "per_pair_loss", "masks_shared_policy_reference")),
    "llada_likelihood": Group(likelihood_case, ("batch_size", "cfg_scale", "log_likelihood")),
    "bd3lm": Group(
        bd3lm_case,
        (
            *("block_size", "mask_rate_min", "mask_rate_max", "antithetic", "resample", "ignore_bos"),
            *("noise", "training", "weight_is_one", "loss"),
        ),
    ),
    "bd3lm_search": Group(search_case, ("intervals", "logged", "chosen")),
    "hnet": Group(golden_concepts.hnet_case, ("load_balancing_loss",)),
    "dlcm": Group(
        lambda golden, name, case: (
            golden_concepts.table_case if "rows" in case else golden_concepts.dlcm_case
        )(golden, name, case),
        (),
    ),
    "elbo_kto": Group(kto_case, ("beta", "completion_lengths", "loss"), _kto_unserved),
}
