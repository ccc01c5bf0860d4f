"""Means and differences of checkpoints, on tensors written without a model."""

import json
from pathlib import Path

import pytest
import torch

from llada_megatron.config.errors import BadInput
from llada_megatron.record import carried
from tests.distributed import run_ranks

SHAPES = {"embedding": (7, 4), "experts": (3, 2, 4), "router.expert_bias": (3,)}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(folder: Path, values: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Path:
    from llada_megatron.checkpoint.shards import ShardsWriter, whole

    folder.mkdir()
    writer = ShardsWriter(folder / "shards")
    for name, value in values.items():
        writer.write(whole(name, *value.shape), value.to(dtype))
    writer.finish()
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    from llada_megatron.checkpoint.shards import ShardsReader, whole

    reader = ShardsReader(folder / "shards")
    return {name: reader.read(whole(name, *shape)) for name, shape in reader.shapes().items()}


def means(folder: Path) -> None:
    from llada_megatron.checkpoint import merge

    parts = [tensors(seed) for seed in range(3)]
    sources = [write(folder / str(seed), part) for seed, part in enumerate(parts)]
    for weights in ([1.0, 1.0, 1.0], [3.0, 0.0, 1.0]):
        target = folder / f"mean_{weights[0]:g}"
        target.mkdir()
        merge.write_mean(sources, weights, target / "shards")
        for name, value in read(target).items():
            expected = sum(w * part[name].double() for w, part in zip(weights, parts, strict=True))
            assert torch.equal(value, (expected / sum(weights)).float()), name
    rounded = [write(folder / f"bf16_{seed}", part, torch.bfloat16) for seed, part in enumerate(parts[:2])]
    (folder / "fp32").mkdir()
    merge.write_mean(rounded, [1.0, 1.0], folder / "fp32" / "shards")
    assert all(value.dtype == torch.float32 for value in read(folder / "fp32").values())
    write(folder / "other", {"embedding": torch.zeros(7, 5)})
    with pytest.raises(BadInput, match="holds other tensors"):
        merge.write_mean([sources[0], folder / "other"], [1.0, 1.0], folder / "refused" / "shards")


def test_a_mean_is_that_of_every_tensor_in_fp32(tmp_path):
    run_ranks(means, tmp_path)


def compared(folder: Path) -> None:
    from llada_megatron.checkpoint import merge

    before, after = tensors(0), tensors(0)
    after["experts"][1, 0, 2] += 0.5
    after["alone"] = torch.ones(2)
    a, b = write(folder / "a", before), write(folder / "b", after)
    [moved], alone = merge.differences(a, b)
    assert moved.name == "experts" and moved.largest == pytest.approx(0.5)
    assert moved.relative_l2 == pytest.approx(0.5 / float(before["experts"].norm()))
    assert alone == [f"alone is in {b} alone"]
    assert merge.differences(a, a) == ([], [])


def test_a_difference_names_the_tensors_that_differ(tmp_path):
    run_ranks(compared, tmp_path)


def test_the_best_checkpoints_of_a_run_become_one_that_is_evaluated_and_trained_from(tmp_path, capsys):
    from llada_megatron.cli import main
    from llada_megatron.verify.layouts import write_corpus

    run_dir = tmp_path / "run"
    small = ["model.hidden_size=64", "model.head_dim=16", "model.expert_hidden_size=32"]
    run = [
        "train",
        "experiment=parity",
        f"data.path=[{write_corpus(tmp_path)}]",
        f"run.dir={run_dir}",
        *small,
    ]
    run += ["data.split='8,2'", "evaluation.block_sizes=['4']", "evaluation.sequences=2", "training.steps=6"]
    every = ["evaluation.every_steps=2", "checkpoint.every_steps=2", "checkpoint.keep_last=3"]
    assert main([*run, *every]) == 0
    carried.write({"tokenizer.json": b"{}"}, run_dir / "checkpoints" / "step_00000006")
    assert main(["checkpoint", "merge", str(run_dir), "--top-k", "2", "--metric", "nll_block4"]) == 0
    said = capsys.readouterr().out
    merged = run_dir / "merged" / "top_2_nll_block4"
    manifest = json.loads((merged / "manifest.json").read_text())
    assert manifest["lineage"]["kind"] == "merge" and len(manifest["lineage"]["sources"]) == 2
    assert (merged / "hf" / "tokenizer.json").read_bytes() == b"{}" and "hf/tokenizer.json" in manifest[
        "files"
    ]
    sources = [source["nll_block4"] for source in manifest["lineage"]["sources"]]
    assert sources == sorted(sources)
    assert max(sources) > manifest["metrics"]["nll_block4"] > 0  # near its sources: the mean of neighbours
    assert f"{manifest['metrics']['nll_block4']:.4f}" in said and "init_from" in said
    assert main(["checkpoint", "verify", str(merged)]) == 0
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert "step_00000006" in capsys.readouterr().out
    assert main(["checkpoint", "diff", str(merged), str(run_dir)]) == 1
    said = capsys.readouterr().out
    assert "relative L2" in said and "more tensors differ" in said
    start = [*run, f"checkpoint.init_from={merged}", f"run.dir={tmp_path / 'next'}", "training.steps=1"]
    assert main(start) == 0
    assert main(["checkpoint", "merge", str(run_dir), "--top-k", "9", "--metric", "nll_block4"]) == 2
    assert "9" in capsys.readouterr().err
