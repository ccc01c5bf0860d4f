"""The whole golden run, and that it fails on the errors which a port of this architecture can make."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_megatron.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
Weights = dict[str, torch.Tensor]


def golden_copy(
    folder: Path,
    *,
    weights: Callable[[Weights], object] | None = None,
    config: dict[str, object] | None = None,
    cases: dict[str, list[str]] | None = None,
) -> Path:
    """The golden directory with altered weights or settings, and only the named cases and losses."""
    tensors = load_file(GOLDEN / "model.safetensors")
    if weights is not None:
        weights(tensors)
    save_file(tensors, folder / "model.safetensors")
    described = json.loads((GOLDEN / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in described.items() if v != "absent"}))
    kept = json.loads((GOLDEN / "cases.json").read_text()) | {"generation": {}}
    for section, names in (cases or {"cases": ["mdlm_full"], "losses": ["sft_mbs1_x2"]}).items():
        kept[section] = {name: kept[section][name] for name in names}
    (folder / "cases.json").write_text(json.dumps(kept))
    shutil.copyfile(GOLDEN / "cases.safetensors", folder / "cases.safetensors")
    return folder


def verify(directory: Path, report: Path, *options: str) -> tuple[int, dict]:
    code = main(["verify", "golden", str(directory), "--json", str(report), *options])
    return code, json.loads(report.read_text())


@pytest.mark.parametrize(
    ("directory", "cases"), [(GOLDEN, 28), (GOLDEN / "ling_ar", 7)], ids=lambda v: str(v)[-8:]
)
def test_every_served_case_agrees_with_the_reference_code(
    directory: Path, cases: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = verify(directory, tmp_path / "report.json")
    assert code == 0 and report["passed"]
    assert len(report["cases"]) == cases and all(case["passed"] for case in report["cases"])
    assert all(value <= report["tolerances"][name] for name, value in report["worst"].items())
    assert f"All {cases} cases agree." in capsys.readouterr().out


def test_a_hybrid_model_agrees_in_forward_and_loss(tmp_path: Path) -> None:
    code, report = verify(golden_copy(tmp_path), tmp_path / "report.json", "--core", "hybrid")
    assert code == 0 and {"mdlm_full", "sft_mbs1_x2"} <= {case["name"] for case in report["cases"]}
    assert {"hidden_states", "final_norm", "logits"} <= report["worst"].keys()


@pytest.mark.slow
def test_every_served_case_agrees_with_a_hybrid_model(tmp_path: Path) -> None:
    code, report = verify(GOLDEN, tmp_path / "report.json", "--core", "hybrid")
    assert code == 0 and len(report["cases"]) == 28


def test_what_is_not_served_is_listed_and_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {"cases": ["blockcausal_bs8"], "losses": ["sft_shifted_labels"]}
    code, report = verify(golden_copy(tmp_path, cases=cases), tmp_path / "report.json")
    assert code == 0
    assert report["not_served"] == ["sft_shifted_labels"]
    assert not {case["name"] for case in report["cases"]} & set(report["not_served"])
    assert "sft_shifted_labels" in capsys.readouterr().out


def zero_expert_bias(weights: Weights) -> None:
    for name in weights:
        if name.endswith("expert_bias"):
            weights[name] = torch.zeros_like(weights[name])


def swap_gate_and_up(weights: Weights) -> None:
    for name in [name for name in weights if "gate_proj" in name]:
        up = name.replace("gate_proj", "up_proj")
        weights[name], weights[up] = weights[up], weights[name]


def interleave_query_key_value(weights: Weights) -> None:
    """Rows as megatron-core groups them, so that the loader's regrouping is one too many."""
    rows = torch.arange((HEADS + 2 * KV_HEADS) * HEAD_DIM).view(-1, HEAD_DIM)
    query, key, value = rows.split([HEADS, KV_HEADS, KV_HEADS])
    grouped = [
        torch.cat([q, k[None], v[None]]) for q, k, v in zip(query.chunk(KV_HEADS), key, value, strict=True)
    ]
    order = torch.cat(grouped).flatten()
    for name in weights:
        if name.endswith("query_key_value.weight"):
            weights[name] = weights[name][order].contiguous()


@pytest.mark.parametrize(
    "error",
    [
        pytest.param({"weights": zero_expert_bias}, id="expert_bias_ignored"),
        pytest.param({"weights": interleave_query_key_value}, id="rows_of_qkv_in_the_wrong_order"),
        pytest.param({"weights": swap_gate_and_up}, id="gate_and_up_swapped"),
        pytest.param({"config": {"rms_norm_eps": 1e-5}}, id="rms_norm_eps_1e-5"),
        pytest.param({"config": {"rope_theta": 10000}}, id="rope_theta_10000"),
        pytest.param({"config": {"partial_rotary_factor": 1.0}}, id="whole_head_rotated"),
        pytest.param({"config": {"routed_scaling_factor": 1.0}}, id="routed_scaling_factor_1"),
        pytest.param({"config": {"topk_group": 4}}, id="group_limit_ignored"),
    ],
)
def test_a_wrong_implementation_fails_in_forward_and_loss(error: dict, tmp_path: Path) -> None:
    code, report = verify(golden_copy(tmp_path, **error), tmp_path / "report.json")
    passed = {case["name"]: case["passed"] for case in report["cases"]}
    assert code == 1 and not report["passed"]
    assert not passed["mdlm_full"] and not passed["sft_mbs1_x2"]
    assert report["worst"]["logits"] > 1  # three orders of magnitude above the tolerance


def test_a_missing_tensor_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = golden_copy(
        tmp_path, weights=lambda tensors: tensors.pop("model.layers.2.mlp.gate.expert_bias")
    )
    assert main(["verify", "golden", str(directory)]) == 2
    assert f"{directory} lacks model.layers.2.mlp.gate.expert_bias." in capsys.readouterr().err


def test_a_tensor_without_a_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"model.layers.4.eh_proj.weight": torch.zeros(4)}
    directory = golden_copy(tmp_path, weights=lambda tensors: tensors.update(extra))
    assert main(["verify", "golden", str(directory)]) == 2
    assert f"{directory} also holds model.layers.4.eh_proj.weight." in capsys.readouterr().err


def test_a_tensor_of_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = golden_copy(tmp_path, config={"intermediate_size": 96})
    assert main(["verify", "golden", str(directory)]) == 2
    said = capsys.readouterr().err
    assert f"model.layers.0.mlp.gate_proj.weight is [128, 64] in {directory}, it should be [96, 64]" in said


def test_shards_read_by_their_index_agree(tmp_path: Path) -> None:
    directory = golden_copy(tmp_path, cases={"cases": ["bdlm_bs4"], "losses": []})
    tensors = load_file(directory / "model.safetensors")
    shard_of = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    (directory / "model.safetensors").unlink()
    assert main(["verify", "golden", str(directory)]) == 0
    (directory / "model-1.safetensors").unlink()
    assert main(["verify", "golden", str(directory)]) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel, which is not served"),
        ({"use_qkv_bias": True}, "sets use_qkv_bias=True: only False is served"),
        ({"num_experts": "absent"}, "config.json has no 'num_experts'"),
    ],
)
def test_an_architecture_that_is_not_served_is_bad_input(
    config: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "golden", str(golden_copy(tmp_path, config=config))]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_cases_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "golden", str(tmp_path / "nowhere")]) == 2
    assert "cases.json does not exist: give a directory of golden cases" in capsys.readouterr().err
