"""Conversions: streamed part by part, proven by a certificate, published only when it passes."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llada_megatron.checkpoint import publish, store
from llada_megatron.checkpoint.shards import Part, ShardsReader, ShardsWriter
from llada_megatron.config.compose import model_of
from llada_megatron.config.errors import BadInput
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert import block_fp8, config_json, tokenizer_files
from llada_megatron.convert.adapted import MergedReader, without_adapters
from llada_megatron.convert.certificate import Certificate, Ledger, tensors_digest
from llada_megatron.convert.families import FAMILIES, SERVED, ExpertLayout, Family, family_of
from llada_megatron.convert.families.shared import BLOCK_SIZE
from llada_megatron.convert.loaded import MAX_PARAMETERS, compare_logits, model_tensors
from llada_megatron.convert.mapping import Entry
from llada_megatron.convert.reference_files import ReferenceFiles
from llada_megatron.convert.safetensors_files import (
    NAMES,
    SafetensorsReader,
    SafetensorsWriter,
    write_json,
)
from llada_megatron.convert.weight_files import REMEDY
from llada_megatron.record import carried
from llada_megatron.record.json_files import read_json
from llada_megatron.record.manifest import Checkpoint, Manifest, find
from llada_megatron.record.run_dir import SHARDS

KEPT_IN_FP32 = ("expert_bias", "e_score_correction_bias")
"""Whatever dtype is asked for: the public code and SGLang hold it in fp32."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""Of config.json, the newer one first."""
Types = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of Hugging Face tensors by name."""


class Reader(Protocol):
    def read(self, part: Part) -> Tensor: ...


class Writer(Protocol):
    def write(self, part: Part, values: Tensor) -> None: ...

    def finish(self) -> None: ...


def hf_to_mcore(
    source: Path, target: Path, *, mask_token_id: int | None = None, mask_token: str | None = None
) -> Certificate:
    """Convert a Hugging Face checkpoint into one of ours, weights only, loadable in every layout.

    Nothing appears at `target` unless the certificate passes. Needs process groups of one process. Raises
    BadInput for a checkpoint that cannot be read and a target that exists.
    """
    files = SafetensorsReader(source)
    described = read_json(source / "config.json", REMEDY)
    block_fp8.require_served(described, bool(files.quantised()), f"{source}/config.json")
    files.dequantised = _stated_dtype(described)
    notes = _source_notes(source, files, described)
    described = block_fp8.without_quantization(described)
    token_id = tokenizer_files.mask_token(
        source, mask_token_id, mask_token, config_json.mask_token_id(described)
    )
    where = f"{source}/config.json"
    model = config_json.model_config(described, token_id, where)
    orders = config_json.orders_of(described, model.vocab_size, where)
    architecture = config_json.architecture_of(described)
    family = family_of(architecture, source)
    layout = family.layout_of(files.tensors)
    entries = list(family.table(model, layout))
    _require_one_type(entries, files, source)
    notes += config_json.doubts(described)
    certificate = Certificate("hf-to-mcore", str(source), architecture, token_id, layout.value, notes=notes)
    certificate.unread = config_json.unread(described, where)
    shapes = files.shapes()
    certificate.dropped = {
        name: reason
        for name in sorted(shapes.keys() - {part.name for entry in entries for part in entry.theirs})
        if (reason := family.drop_reason(name, model, described))
    }
    used = {name: shape for name, shape in shapes.items() if name not in certificate.dropped}
    if not _fits(certificate, entries, str(source), used, model):
        return certificate
    with written_aside(target) as aside:
        writer = ShardsWriter(aside / SHARDS)
        _convert(certificate, entries, files, writer, lambda: ShardsReader(aside / SHARDS), to_ours=True)
        _check_logits(certificate, family, ReferenceFiles(source, files.dequantised), described, aside, model)
        if certificate.passed:
            tokenizer_files.carry_in(source, aside)
            certificate.write(aside)
            lineage = {
                "kind": "hf-to-mcore",
                "source": str(source.resolve()),
                "architecture": architecture,
                "tensors_sha256": tensors_digest(certificate.hugging_face),
            }
            says = family.says_block_size(model, architecture)
            blocks = (described.get(BLOCK_SIZE) or 0) if says else 0
            config = {"model": asdict(model)} | ({"levenshtein": orders} if orders else {})
            manifest = Manifest(config=config, block_size=blocks, lineage=lineage)
            publish.finish(aside, target, manifest)
    return certificate


def mcore_to_hf(
    source: str,
    target: Path,
    *,
    architecture: str | None = None,
    layout: ExpertLayout = ExpertLayout.separate,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    mask_token: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Certificate:
    """Convert a checkpoint of ours, or the newest of a run, into a Hugging Face checkpoint.

    Tensors keep their type unless `dtype` is given. Without `architecture` a MoE that was trained with
    diffusion is LLaDA2MoeModelLM. Otherwise as `hf_to_mcore`.
    """
    checkpoint = store.verified(find(source), weights_alone=True)
    manifest = checkpoint.manifest
    model = model_of(checkpoint.path, manifest.config_of_weights)
    folder = carried.folder_of(checkpoint)
    came_as = carried_config(checkpoint)
    plain = without_adapters(model)
    architecture = architecture or architecture_for(manifest, plain, came_as)
    family = _family_to_leave_as(architecture, layout, manifest)
    entries = list(family.table(plain, layout))
    if tokenizer is not None:
        tokenizer_files.require_tokenizer(tokenizer)
        tokenizer_files.mask_token(tokenizer, model.mask_token_id, mask_token)
    shards = MergedReader(ShardsReader(checkpoint.path / SHARDS), model.lora, dtype)
    types = _types(entries, shards, dtype)
    written, notes = _written_type(types)
    positions = manifest.config_of_weights.get("data", {}).get("sequence_length")
    of_run = positions, manifest.block_size, _orders(manifest)
    described = config_json.describe(plain, architecture, came_as, written, *of_run)
    notes += config_json.changes(_optional_json(folder, "config.json"), described, positions)
    if model.lora.rank:
        notes.append(f"adapters of rank {model.lora.rank} were added to their weights")
    certificate = Certificate(
        "mcore-to-hf", str(checkpoint.path), architecture, model.mask_token_id, layout.value, notes=notes
    )
    if not _fits(certificate, entries, str(checkpoint.path), shards.shapes(), plain):
        return certificate
    with written_aside(target) as aside:
        writer = SafetensorsWriter(aside, types, max_shard_bytes)
        _convert(
            certificate, entries, shards, writer, lambda: SafetensorsReader(aside), to_ours=False, dtype=dtype
        )
        if shards.rounds():
            certificate.logits = {"compared": False, "reason": "sums with adapters were rounded"}
        else:
            _check_logits(certificate, family, ReferenceFiles(aside), described, checkpoint.path, model)
        if certificate.passed:
            _write_configs(aside, folder, described, model.mask_token_id)
            same = config_json.architecture_of(came_as) == architecture
            tokenizer_files.carry_out(aside, tokenizer=tokenizer or folder, code=folder if same else None)
            if not tokenizer_files.has_tokenizer(aside):
                notes.append(f"no tokenizer came with {checkpoint.path}: give its directory as --tokenizer")
            certificate.write(aside)
            publish.give_name(aside, target)
    return certificate


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """The directory to write into; it is gone afterwards unless it was given its name."""
    aside = publish.begin(target)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _require_one_type(entries: list[Entry], files: SafetensorsReader, source: Path) -> None:
    """Raise BadInput where tensors of several types would become one of ours."""
    first: dict[str, tuple[str, torch.dtype]] = {}
    for entry in entries:
        for part in entry.theirs:
            if part.name not in files.tensors:
                continue
            dtype = files.dtype(part.name)
            one, other = first.setdefault(entry.ours.name, (part.name, dtype))
            if dtype != other:
                raise BadInput(
                    f"{source} has {one} in {NAMES[other]} and {part.name} in {NAMES[dtype]}, which become"
                    " one tensor here: save the model in one type."
                )


def _fits(
    certificate: Certificate,
    entries: list[Entry],
    holder: str,
    held: dict[str, tuple[int, ...]],
    model: ModelConfig,
) -> bool:
    """Whether the table, what the source holds and megatron-core's own model agree in names and shapes."""
    built, parameters = model_tensors(model)
    ours = {entry.ours.name: entry.ours.shape for entry in entries}
    theirs = {part.name: part.shape for entry in entries for part in entry.theirs}
    certificate.parameters["architecture"] = parameters
    certificate.compare("the mapping table", ours, built)
    certificate.compare(holder, held, theirs if certificate.direction == "hf-to-mcore" else ours)
    return certificate.passed


def _convert(
    certificate: Certificate,
    entries: list[Entry],
    reader: Reader,
    writer: Writer,
    reopen: Callable[[], Reader],
    *,
    to_ours: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Write every entry, read the result again, and note whatever does not fit in the certificate."""
    source, target = Ledger("source"), Ledger("target")
    for entry in entries:  # no more than one entry's tensors are in memory
        inputs, outputs = (entry.theirs, (entry.ours,)) if to_ours else ((entry.ours,), entry.theirs)
        values = [reader.read(part) for part in inputs]
        for part, value in zip(inputs, values, strict=True):
            source.record(part, value)
        converted = entry.to_ours(values) if to_ours else entry.to_theirs(values)
        for part, value in zip(outputs, converted, strict=True):
            value = value.to(_type(part, value.dtype, dtype)).contiguous()
            target.record(part, value)
            writer.write(part, value)
    writer.finish()
    again = Ledger("the result")
    _read_back(entries, reopen(), again, to_ours=to_ours, convert_back=dtype is None)
    theirs, ours = (source, target) if to_ours else (target, source)
    certificate.hugging_face, certificate.megatron = theirs.as_json(), ours.as_json()
    for ledger in (source, target, again):
        certificate.problems += ledger.problems
    built = {part.name: part.shape for entry in entries for part in (entry.ours, *entry.theirs)}
    certificate.compare("what was read and written", source.shapes() | target.shapes(), built)
    if dtype is None:
        certificate.same_hashes("the result, read and converted back,", again, source)
    else:
        certificate.same_hashes("the result, read again,", again, target)
    written = sum(prod(s) for name, s in target.shapes().items() if not name.endswith(KEPT_IN_FP32))
    certificate.count_parameters(written)


def _read_back(
    entries: list[Entry], result: Reader, ledger: Ledger, *, to_ours: bool, convert_back: bool
) -> None:
    """Record the parts of the result or, converted back, those that the source should have had."""
    for entry in entries:
        parts = (entry.ours,) if to_ours else entry.theirs
        values = [result.read(part) for part in parts]
        if convert_back:
            parts = entry.theirs if to_ours else (entry.ours,)
            values = entry.to_theirs(values) if to_ours else entry.to_ours(values)
        for part, value in zip(parts, values, strict=True):
            ledger.record(part, value)


def _stated_dtype(described: dict[str, Any]) -> torch.dtype:
    """What config.json says its tensors are, for those that it must be said of; bf16 where it does not."""
    said = next((described[key] for key in DTYPE_KEYS if described.get(key)), None)
    served = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return served.get(str(said), torch.bfloat16)


def _source_notes(source: Path, files: SafetensorsReader, described: dict[str, Any]) -> list[str]:
    """What of a Hugging Face folder is not taken as it lies there."""
    notes = []
    if files.unread:
        notes.append(f"not read: {', '.join(files.unread)}, which are no part of the checkpoint")
    if quantised := files.quantised():
        block, dtype = block_fp8.BLOCK, str(files.dequantised).removeprefix("torch.")
        notes.append(f"{len(quantised)} matrices in fp8 with a scale per {block} x {block} became {dtype}")
    elif kept := [key for key in block_fp8.KEYS if key in described]:
        notes.append(f"config.json has {', '.join(kept)} and no tensor is quantised: it is left out")
    if not tokenizer_files.has_tokenizer(source):
        notes.append(f"{source} holds no tokenizer")
    return notes


def _types(entries: list[Entry], shards: MergedReader, asked: torch.dtype | None) -> Types:
    """Of the tensors to write; those of which the checkpoint has nothing are left out."""
    held = shards.shapes()
    return {
        part.name: (_type(part, shards.dtype(entry.ours.name), asked), part.shape)
        for entry in entries
        if entry.ours.name in held
        for part in entry.theirs
    }


def _written_type(types: Types) -> tuple[str, list[str]]:
    """What config.json says of tensors of these types: that of most numbers; and a note where they differ."""
    counts: Counter[str] = Counter()
    for name, (dtype, shape) in types.items():
        if not name.endswith(KEPT_IN_FP32):
            counts[str(dtype).removeprefix("torch.")] += prod(shape)
    if not counts:
        return "bfloat16", []
    most = max(counts, key=lambda dtype: counts[dtype])
    said = ", ".join(f"{count:,} numbers in {dtype}" for dtype, count in counts.most_common())
    return most, [f"{said}: config.json says {most}"] if len(counts) > 1 else []


def _type(part: Part, stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return stored if asked is None or part.name.endswith(KEPT_IN_FP32) else asked


def carried_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json that a checkpoint's weights came with, without quantisation; empty if none."""
    folder = carried.folder_of(checkpoint)
    return block_fp8.without_quantization(_optional_json(folder, "config.json"))


def architecture_for(manifest: Manifest, model: ModelConfig, came_as: dict[str, Any]) -> str:
    """What the model came as, or the first family's that can hold it, by what its last stage trained."""
    came = config_json.architecture_of(came_as)
    families = (*([FAMILIES[came]] if came in FAMILIES else []), *SERVED)
    kind = [one for one in families if one.builds == model.family and one.experts == model.has_experts]
    if not kind:
        raise BadInput(f"No Hugging Face architecture is served that holds a model of family {model.family}.")
    fitting = [one for one in kind if not one.differing(model)] or kind
    if came not in FAMILIES and _fills_masks(manifest):
        fitting.sort(key=lambda one: one.after_diffusion is None)
    if _fills_masks(manifest) and fitting[0].after_diffusion:
        return fitting[0].after_diffusion
    return came if came in fitting[0].architectures else next(iter(fitting[0].architectures))


def _family_to_leave_as(architecture: str, layout: ExpertLayout, manifest: Manifest) -> Family:
    """That of --architecture; BadInput where it has no such layout of experts, or reads other logits."""
    family = family_of(architecture, "--architecture")
    if layout is ExpertLayout.stacked and family.experts and family.stacked_suffix is None:
        raise BadInput(f"{architecture} holds a matrix per expert: leave --expert-layout stacked out.")
    if architecture in family.shifted and _fills_masks(manifest):
        raise BadInput(
            f"{architecture} reads the logits before a mask, and stage {manifest.stage} trained those at the"
            f" mask: choose --architecture {family.after_diffusion}."
        )
    return family


def _fills_masks(manifest: Manifest) -> bool:
    """Whether the last stage of a run trained diffusion."""
    stages = {stage["name"]: stage for stage in manifest.config.get("schedule", {}).get("stages", [])}
    objective = stages.get(manifest.stage, {}).get("objective")
    return bool(objective) and not OBJECTIVES[objective].causal


def _check_logits(
    certificate: Certificate,
    family: Family,
    files: ReferenceFiles,
    described: dict[str, Any],
    checkpoint: Path,
    model: ModelConfig,
) -> None:
    """Compare what both sides compute, where they hold the same numbers and are small enough to run."""
    if not certificate.passed:
        return
    if certificate.parameters["architecture"] > MAX_PARAMETERS:
        certificate.logits = {"compared": False, "reason": f"more than {MAX_PARAMETERS:,} parameters"}
        return
    if certificate.rounded():
        certificate.logits = {"compared": False, "reason": "the numbers were rounded to another type"}
        return
    certificate.compare_logits(compare_logits(family.reference(files, described), checkpoint, model))


def _orders(manifest: Manifest) -> dict[str, int]:
    """The rows that are orders, of a model that has some."""
    said = manifest.config.get("levenshtein") or {}
    found = {key: said.get(key, 0) for key in config_json.ORDERS}
    return found if any(found.values()) else {}


def _optional_json(folder: Path | None, name: str) -> dict[str, Any]:
    return read_json(folder / name, REMEDY) if folder and (folder / name).is_file() else {}


def _write_configs(target: Path, folder: Path | None, described: dict[str, Any], mask_token_id: int) -> None:
    """Both configurations; one that says the same as the one that was carried along is that file."""
    generation = _optional_json(folder, "generation_config.json")
    wanted = {
        "config.json": (_optional_json(folder, "config.json"), described),
        "generation_config.json": (
            generation,
            config_json.generation_config(generation, described, mask_token_id),
        ),
    }
    for name, (before, now) in wanted.items():
        if folder and before and before == now:
            shutil.copyfile(folder / name, target / name)
        else:
            write_json(target / name, now)
