"""A converted checkpoint loads in every layout, and leaves every layout as the same numbers."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llada_megatron.config.compose import compose
from llada_megatron.record.manifest import Checkpoint
from tests.convert import checkpoints
from tests.convert.test_round_trip import certificate, to_hf, to_mcore
from tests.distributed import run_ranks

STAGE = "schedule.stages=[{name: %s, objective: %s, block_size: '%s', tokens: 256}]"


def one_step(config) -> int:
    from llada_megatron.training import loop

    return loop.run(config).step


def as_overrides(name: str, value: object) -> list[str]:
    if isinstance(value, dict):
        return [line for key, one in value.items() for line in as_overrides(f"{name}.{key}", one)]
    return [f"{name}={value}"]


def trained(source: Path, folder: Path, corpus: str, stage: str, *overrides: str, **layout: int) -> Path:
    """A run of one step from a converted checkpoint, in a layout, at a learning rate of zero."""
    assert to_mcore(source, folder / "ours") == 0
    model = Checkpoint.read(folder / "ours").manifest.config["model"]
    config = compose(
        [
            "experiment=parity",
            *as_overrides("model", model),
            "model.expert_bias_update_rate=0",
            f"data.path=[{corpus}]",
            "data.sequence_length=64",
            "data.split='8,2'",
            f"run.dir={folder / 'run'}",
            f"checkpoint.init_from={folder / 'ours'}",
            "optimizer.lr=0",
            "optimizer.warmup_tokens=0",
            stage,
            "layout.global_batch=4",
            *[f"layout.{name}={value}" for name, value in layout.items()],
            *overrides,
        ]
    )
    assert run_ranks(one_step, config, processes=config.layout.processes) == [1] * config.layout.processes
    return folder / "run"


DIFFUSION = STAGE % ("bdlm", "diffusion", "16")
FAST = [("bailing", dict(processes=2, tp=2, ep=2))]
SLOW = [
    ("bailing", dict(processes=4, pp=2, ep=2, vpp=2, pipeline="[1,1,1,0]")),
    ("bailing", dict(processes=2, tp=2, etp=2)),
    ("llama_untied", dict(processes=4, tp=2, pp=2, pipeline="[2,1]")),
    ("qwen3_moe", dict(processes=2, tp=2, ep=2)),
    ("dream", dict(processes=2, tp=2)),
    ("llada", dict(processes=4, tp=2, pp=2, pipeline="[2,1]")),
    ("llada_moe", dict(processes=2, tp=2, ep=2)),
]
FULL = [
    ("bailing", dict(processes=1)),
    ("bailing", dict(processes=2, pp=2)),
    ("bailing", dict(processes=3, pp=3)),
    ("bailing", dict(processes=2, ep=2)),
    ("bailing", dict(processes=2, tp=2)),
    ("bailing", dict(processes=4, tp=2, pp=2, pipeline="[1,2]")),
    ("llama", dict(processes=2, tp=2)),
    ("llama", dict(processes=2, pp=2, pipeline="[2,1]")),
    ("qwen3_tied", dict(processes=2, pp=2, pipeline="[2,1]")),
    ("sdar_moe", dict(processes=4, ep=2, pp=2, pipeline="[2,1]")),
    ("qwen2", dict(processes=4, tp=2, pp=2, pipeline="[2,1]")),
]


DIFFUSION_OF = {
    **dict(bailing="LLaDA2MoeModelLM", llama="LlamaForCausalLM", llama_untied="LlamaForCausalLM"),
    **dict(qwen2="Qwen2ForCausalLM", dream="Qwen2ForCausalLM", qwen3_tied="SDARForCausalLM"),
    **dict(qwen3_moe="SDARMoeForCausalLM", sdar_moe="SDARMoeForCausalLM"),
    **dict(llada="LLaDAModelLM", llada_moe="LLaDAMoEModelLM"),
}


def check_layout(kind: str, layout: dict, corpus: str, folder: Path) -> None:
    if layout.get("pp") == 2 and "pipeline" not in layout:
        layout = layout | {"pipeline": "[2,1]"}
    source = checkpoints.add_tokenizer(
        checkpoints.write(folder / "source", kind), {checkpoints.MASK: "<|mask|>"}
    )
    run = trained(source, folder, corpus, DIFFUSION, "precision=bf16", **layout)
    if kind == "dream":  # its code would read every token one place off
        assert to_hf(run, folder / "back", "--architecture", "DreamModel") == 2
    assert to_hf(run, folder / "back") == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, folder / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    described = json.loads((folder / "back" / "config.json").read_text())
    assert described["architectures"] == [DIFFUSION_OF[kind]]  # the run ended in a diffusion stage
    assert (folder / "back" / "tokenizer.json").is_file()  # found by checkpoint.init_from


@pytest.mark.parametrize("kind, layout", FAST)
def test_in_and_out_of_tensor_and_expert_parallelism(kind, layout, corpus, tmp_path) -> None:
    check_layout(kind, layout, corpus, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind, layout", SLOW, ids=str)
def test_in_and_out_of_virtual_stages_expert_tensors_and_two_axes(kind, layout, corpus, tmp_path) -> None:
    check_layout(kind, layout, corpus, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("kind, layout", FULL, ids=str)
def test_in_and_out_of_every_other_layout(kind, layout, corpus, tmp_path) -> None:
    check_layout(kind, layout, corpus, tmp_path)


def test_fp32_training_leaves_fp32_weights_that_round_to_the_source(corpus, tmp_path) -> None:
    source = checkpoints.write(tmp_path / "source", "llama")
    autoregressive = STAGE % ("ar", "autoregressive", "1")
    run = trained(source, tmp_path, corpus, autoregressive, "precision=fp32")
    assert to_hf(run, tmp_path / "wide") == 0
    assert certificate(tmp_path / "wide")["logits"]["compared"]
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    assert to_hf(run, tmp_path / "back", "--dtype", "bf16") == 0
    before, after = ((p / "model.safetensors").read_bytes() for p in (source, tmp_path / "back"))
    assert before == after


def peak_bytes(source: Path, target: Path) -> int:
    assert to_mcore(source, target) == 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "HIDDEN", 1024)
    monkeypatch.setattr(checkpoints, "DENSE_WIDTH", 4096)
    peaks, sizes = [], []
    for layers in (4, 16):
        monkeypatch.setattr(checkpoints, "LAYERS", layers)
        changed = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": layers,
            "head_dim": 16,
        }
        monkeypatch.setattr(checkpoints, "LLAMA", checkpoints.LLAMA | changed)
        source = checkpoints.write(tmp_path / f"{layers}", "llama")
        sizes.append((source / "model.safetensors").stat().st_size)
        peaks += run_ranks(peak_bytes, source, tmp_path / f"ours{layers}")
    assert sizes[1] - sizes[0] > 250e6
    assert peaks[1] - peaks[0] < 30e6
