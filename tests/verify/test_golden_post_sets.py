"""Sets of golden cases of post-training, by the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_megatron.cli import main

POST = Path(__file__).parents[1] / "golden_post"
CHECKPOINT = POST.parent / "golden"
SFT = "sft_quantised"
Cases = dict[str, dict[str, Any]]
Tensors = dict[str, torch.Tensor]


def post_copy(
    folder: Path,
    *names: str,
    cases: Callable[[Cases], object] = lambda cases: None,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
) -> Path:
    """The set with only the named cases, altered, beside no checkpoint."""
    described = json.loads((POST / "cases.json").read_text())
    described["cases"] = {name: described["cases"][name] for name in names}
    cases(described["cases"])
    stored = load_file(POST / "cases.safetensors")
    tensors(stored)
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(described))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "cases.safetensors")
    return folder


def verify(directory: Path, report: Path, *options: str) -> tuple[int, dict]:
    code = main(["verify", "golden", str(directory), *options, "--json", str(report)])
    return code, json.loads(report.read_text())


def test_every_served_case_agrees_with_the_checkpoint_of_the_sibling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = verify(POST, tmp_path / "report.json")
    assert code == 0 and report["passed"]
    quantities: dict[str, set[str]] = {}
    for case in report["cases"]:
        quantities.setdefault(case["name"].split("_")[0], set()).update(case["differences"])
    preference = {"bound", "preference", "preference_norms"}
    assert quantities == {
        "cap": {"cross_entropy", "entropy", "right", "loss", "grad_norms"},
        "pair": {"mask", "right", "loss", "grad_norms"},
        "sft": {"lengths", "cross_entropy", "loss", "grad_norms"},
        "dpo": {"cross_entropy"} | preference,
        "vrpo": {"cross_entropy"} | preference,
        "kto": preference,
        "lik": {"mask", "cross_entropy", "bound"},
        "bd3": {"rate", "mask", "cross_entropy", "loss", "grad_norms", "variance", "chosen"},
        "hnet": {"boundary_probability", "boundaries", "concepts", "parser"},
        "dlcm": {"boundary_probability", "boundaries", "concepts", "concept_attention", "parser"},
    }
    assert report["derived"] == [
        f"{group}: independent derivation, not public code" for group in ("dpo", "dlcm")
    ]
    assert report["not_served"] == [
        "pair_cap_none_correct_toy (described in words alone)",
        "kto_beta0.1_global_mean_D1_U1 (z0 global_mean)",
        "kto_beta0.1_global_mean_D2_U0.5 (z0 global_mean)",
    ]
    said = capsys.readouterr().out
    assert "All 59 cases agree." in said and "No numbers of public code: dpo:" in said


def test_a_group_that_nobody_knows_is_listed_and_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def others(cases: Cases) -> None:
        cases |= {f"others_{name}": {"group": "others"} for name in ("identity", "projected")}

    def theirs(tensors: Tensors) -> None:
        tensors["others_identity.hidden"] = torch.zeros(2)
        tensors["sft_quantised.seq0.novelty"] = torch.zeros(2)

    folder = post_copy(tmp_path / "set", SFT, cases=others, tensors=theirs)
    code, report = verify(folder, tmp_path / "report.json", "--model", str(CHECKPOINT))
    assert code == 0 and [case["name"] for case in report["cases"]] == [SFT]
    assert report["not_served"] == ["group others (cases: 2)"] and not report["derived"]
    assert "sft_quantised.seq0.novelty" in report["unknown"]
    assert "others_identity.hidden" not in report["unknown"]
    assert "group others" in capsys.readouterr().out


def test_a_set_without_its_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = post_copy(tmp_path / "set", SFT)
    assert main(["verify", "golden", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/golden/config.json" in said and said.count("\n") == 1
