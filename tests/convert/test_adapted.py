"""Adapters leave as PEFT reads them, and merged: both hold what was trained."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llada_megatron.cli import main
from llada_megatron.config.compose import compose
from llada_megatron.record.manifest import Checkpoint
from tests.convert import checkpoints
from tests.convert.test_layouts import DIFFUSION, as_overrides, one_step
from tests.convert.test_round_trip import certificate, to_hf, to_mcore
from tests.distributed import run_ranks

RANK, ALPHA = 4, 8
PREFIX = "base_model.model."


def adapted(kind: str, corpus: str, folder: Path, *overrides: str) -> Path:
    """A run of one step that trains adapters beside a converted checkpoint; its B are not zero."""
    source = checkpoints.write(folder / "source", kind)
    assert to_mcore(source, folder / "ours") == 0
    config = compose(
        [
            "experiment=parity",
            *as_overrides("model", Checkpoint.read(folder / "ours").manifest.config["model"]),
            f"model.lora.rank={RANK}",
            f"model.lora.alpha={ALPHA}",
            f"data.path=[{corpus}]",
            "data.sequence_length=64",
            "data.split='8,2'",
            f"run.dir={folder / 'run'}",
            f"checkpoint.init_from={folder / 'ours'}",
            "optimizer.lr=1e-2",
            "optimizer.warmup_tokens=0",
            DIFFUSION,
            "layout.global_batch=4",
            *overrides,
        ]
    )
    assert run_ranks(one_step, config, processes=config.layout.processes) == [1] * config.layout.processes
    return folder / "run"


def to_peft(source: Path, target: Path) -> int:
    return main(["convert", "mcore-to-peft", "--from", str(source), "--to", str(target)])


@pytest.mark.parametrize("kind", ["bailing", "llama"])
def test_base_and_adapters_make_the_merged_model(kind, corpus, tmp_path):
    layout = ["layout.tp=2", "layout.etp=2"] if kind == "bailing" else []
    run = adapted(kind, corpus, tmp_path, *layout)
    assert to_hf(run, tmp_path / "merged") == 0 and to_peft(run, tmp_path / "peft") == 0
    held = certificate(tmp_path / "merged")
    assert held["logits"]["max_difference"] < 1e-5 * held["logits"]["max_logit"]
    assert f"adapters of rank {RANK} were added to their weights" in held["notes"]
    base = load_file(tmp_path / "source" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    factors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", RANK, ALPHA)
    modules = {
        name.removesuffix(".weight") for name in merged if re.search(r"(proj|dense|value)\.weight$", name)
    }
    assert {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in factors} == modules
    for name, tensor in merged.items():
        module = name.removesuffix(".weight")
        assert (re.fullmatch(said["target_modules"], module) is not None) == (module in modules)
        expected = base[name].float()
        if module in modules:
            a, b = (factors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
            change = ALPHA / RANK * (b @ a)
            assert change.abs().max() > 1e-4
            expected = expected + change
        torch.testing.assert_close(tensor.float(), expected, rtol=1e-6, atol=1e-6, msg=name)


def test_a_checkpoint_without_adapters_has_none_to_export(tmp_path, capsys):
    assert to_mcore(checkpoints.write(tmp_path / "source", "llama"), tmp_path / "ours") == 0
    assert to_peft(tmp_path / "ours", tmp_path / "peft") == 2
    assert "has no adapters" in capsys.readouterr().err and not (tmp_path / "peft").exists()
