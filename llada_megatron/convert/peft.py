"""A checkpoint's adapters alone, as PEFT reads them (huggingface.co/docs/peft, "LoRA", checkpoint format).

adapter_model.safetensors holds `base_model.model.MODULE.lora_A.weight` [rank, in] and `lora_B.weight` [out,
rank] for every Linear of the Hugging Face model that has an adapter; adapter_config.json says the rest. Where
one matrix of ours is several of theirs (Q, K and V; gate and up), these share A and each has its rows of B.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from llada_megatron.checkpoint import publish, store
from llada_megatron.checkpoint.shards import ShardsReader, whole
from llada_megatron.config.compose import model_of
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LoraConfig
from llada_megatron.convert.adapted import WEIGHT, MergedReader, without_adapters
from llada_megatron.convert.certificate import Certificate, Ledger
from llada_megatron.convert.conversion import architecture_for, carried_config, written_aside
from llada_megatron.convert.families import ExpertLayout, family_of
from llada_megatron.convert.mapping import Entry
from llada_megatron.convert.safetensors_files import write_json
from llada_megatron.record.manifest import find
from llada_megatron.record.run_dir import SHARDS

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
TOLERANCE = 1e-5
"""Largest difference of what both sides add to a matrix, over its largest element: fp32 products."""


def mcore_to_peft(source: str, target: Path, *, architecture: str | None = None) -> Certificate:
    """Write the adapters of a checkpoint of ours, or of a run's newest; the base model is not written.

    Nothing appears at `target` unless the files, read again, add to every matrix what the checkpoint's
    adapters do. Raises BadInput for a checkpoint without adapters and a target that exists.
    """
    checkpoint = store.verified(find(source), weights_alone=True)
    model = model_of(checkpoint.path, checkpoint.manifest.config_of_weights)
    if not model.lora.rank:
        raise BadInput(f"{checkpoint.path} has no adapters: export it with `llada convert mcore-to-hf`.")
    plain = without_adapters(model)
    architecture = architecture or architecture_for(checkpoint.manifest, plain, carried_config(checkpoint))
    entries = list(family_of(architecture, "--architecture").table(plain, ExpertLayout.separate))
    reader = MergedReader(ShardsReader(checkpoint.path / SHARDS), model.lora)
    certificate = Certificate("mcore-to-peft", str(checkpoint.path), architecture, model.mask_token_id)
    adapted = [entry for entry in entries if reader.has_adapter(entry.ours.name)]
    with written_aside(target) as aside:
        tensors = {
            f"{PREFIX}{module}.lora_{side}{WEIGHT}": factor.contiguous().clone()
            for entry in adapted
            for module, factors in _factors(entry, reader)
            for side, factor in zip("AB", factors, strict=True)
        }
        save_file(tensors, aside / TENSORS, metadata={"format": "pt"})
        modules = [name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors]
        write_json(aside / CONFIG, _described(model.lora, modules))
        _check(certificate, adapted, reader, load_file(aside / TENSORS))
        if certificate.passed:
            certificate.write(aside)
            publish.give_name(aside, target)
    return certificate


def _factors(entry: Entry, reader: MergedReader) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(module, (A [rank, in], B [out, rank])) of each Hugging Face matrix of an entry."""
    a, b = (factor.flatten(0, -2) for factor in reader.factors(entry.ours))
    b = b if entry.heads is None else entry.heads.ungroup(b)
    for part, rows in zip(entry.theirs, b.split([part.size[-2] for part in entry.theirs]), strict=True):
        yield part.name.removesuffix(WEIGHT), (a, rows)


def _described(lora: LoraConfig, modules: list[str]) -> dict[str, Any]:
    """adapter_config.json; target_modules is a pattern that whole names must match."""
    kinds = dict.fromkeys(re.sub(r"\d+", "#", module) for module in modules)
    pattern = "|".join(re.escape(kind).replace(r"\#", r"\d+") for kind in kinds)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": pattern,
        "inference_mode": True,
    }


def _check(
    certificate: Certificate, entries: list[Entry], reader: MergedReader, written: dict[str, Tensor]
) -> None:
    """Note where the files add other numbers than the checkpoint's adapters, under the names of theirs."""
    worst, scale = 0.0, reader.lora.alpha / reader.lora.rank
    result = Ledger("the result")
    for name, factor in written.items():
        result.record(whole(name, *factor.shape), factor)
    certificate.hugging_face, certificate.problems = result.as_json(), result.problems
    certificate.parameters["written"] = sum(factor.numel() for factor in written.values())
    for entry in entries:
        for part, expected in zip(entry.theirs, entry.to_theirs([reader.added(entry.ours)]), strict=True):
            module = PREFIX + part.name.removesuffix(WEIGHT)
            a, b = (written[f"{module}.lora_{side}{WEIGHT}"].float() for side in "AB")
            difference, largest = float((scale * (b @ a) - expected).abs().max()), float(expected.abs().max())
            worst = max(worst, difference / largest if largest else difference)
            if not difference <= TOLERANCE * largest:
                certificate.problems.append(f"{module} adds other numbers than the checkpoint's adapter")
    said = f"adapters alone; what they add to a matrix differs by {worst:.0e} of its largest number at most"
    certificate.logits = {"compared": False, "reason": said}
