"""Sets of golden cases that others wrote: checked on what they store, and what is not known is listed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_megatron.cli import main
from tests.verify.golden_of_others import ZERO, write_set
from tests.verify.test_golden import golden_copy, verify


def stored(folder: Path, **changes: Callable[[torch.Tensor], torch.Tensor] | None) -> Path:
    """The set with tensors altered, or left out where there is no function."""
    tensors = load_file(folder / "cases.safetensors")
    for name, change in changes.items():
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor).contiguous()
    save_file(tensors, folder / "cases.safetensors")
    return folder


def described(folder: Path, change: Callable[[dict], object]) -> Path:
    content = json.loads((folder / "cases.json").read_text())
    change(content)
    (folder / "cases.json").write_text(json.dumps(content))
    return folder


def test_it_is_checked_on_what_it_stores_and_the_rest_is_listed_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = verify(write_set(tmp_path / "set"), tmp_path / "report.json")
    assert code == 0 and report["passed"]
    quantities = {case["name"]: set(case["differences"]) for case in report["cases"]}
    loss = {"cross_entropy", "loss", "grad_norms", "gradients"}
    assert quantities == {"full": {"logits"}, "flat": loss}
    assert report["not_served"] == ["theirs (kind likelihood)", "theirs (loss_weight_type cosine)"]
    assert report["unknown"] == [
        "full.attention_entropy",
        "grad.flat.model.layers.7.mlp.up_proj.weight",
        "section preferences of cases.json",
    ]
    said = " ".join(capsys.readouterr().out.split())
    assert "Not known, not read: full.attention_entropy" in said and "All 2 cases agree." in said


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("full.logits", lambda logits: logits + 0.01),
        ("loss.flat.per_token_ce", lambda entropies: entropies + 0.01),
        (f"grad.flat.{ZERO}", lambda gradient: gradient + 1e-30),
        ("grad.flat.model.layers.0.self_attn.q_proj.weight", torch.zeros_like),
    ],
)
def test_a_number_that_differs_fails(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    code, report = verify(stored(write_set(tmp_path / "set"), **{name: change}), tmp_path / "report.json")
    assert code == 1 and not report["passed"]
    (failed,) = [case["name"] for case in report["cases"] if not case["passed"]]
    assert failed in name


def test_a_norm_of_zero_that_is_none_fails(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    described(folder, lambda content: content["losses"]["flat"]["grad_norms"].update({"lm_head.weight": 0.0}))
    code, report = verify(folder, tmp_path / "report.json")
    assert code == 1 and report["worst"]["grad_norms"] > 1e300


@pytest.mark.parametrize("missing", [["router_topk_weight"], ["router_topk_weight", "router_topk_idx"]])
def test_a_case_of_experts_without_their_weights_or_without_any(missing: list[str], tmp_path: Path) -> None:
    folder = golden_copy(tmp_path, cases={"cases": ["mdlm_doc"], "losses": []})
    stored(folder, **{f"mdlm_doc.{name}": None for name in missing})
    code, report = verify(folder, tmp_path / "report.json")
    (case,) = [case for case in report["cases"] if case["name"] == "mdlm_doc"]
    assert case["passed"] and "router_weights" not in case["differences"]
    assert ("routing" in case["differences"]) == (len(missing) == 1)
    assert code == 0 and {"bdlm_bs4.logits", "grad.sft_mbs1_x2.lm_head.weight"} & {*report["unknown"]}


def other_experts(index: torch.Tensor) -> torch.Tensor:
    return index.flip(0)


def test_other_experts_fail_without_their_weights(tmp_path: Path) -> None:
    folder = golden_copy(tmp_path, cases={"cases": ["mdlm_doc"], "losses": []})
    stored(folder, **{"mdlm_doc.router_topk_weight": None, "mdlm_doc.router_topk_idx": other_experts})
    code, report = verify(folder, tmp_path / "report.json")
    assert code == 1 and report["worst"]["routing"] > 0


def test_a_set_of_which_nothing_is_served_does_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stored(write_set(tmp_path / "set"), **{"full.logits": None})
    described(folder, lambda content: content.pop("losses"))
    code, report = verify(folder, tmp_path / "report.json")
    assert code == 1 and not report["cases"]
    assert "full (stores nothing that is compared)" in report["not_served"]
    assert "No case is served." in capsys.readouterr().out


BAD = [
    (lambda f: stored(f, **{"full.input_ids": None}), "holds no full.input_ids: give a directory"),
    (lambda f: stored(f, **{"full.position_ids": None}), "holds no full.position_ids"),
    (
        lambda f: stored(f, **{"full.input_ids": lambda ids: ids + 30}),
        "input_ids that is not int64 below 32",
    ),
    (lambda f: stored(f, **{"full.input_ids": torch.Tensor.int}), "full.input_ids that is not int64"),
    (lambda f: stored(f, **{"full.logits": lambda logits: logits[:1]}), "full.logits of shape [1, 32]"),
    (lambda f: stored(f, **{"loss.flat.t": None}), "holds no loss.flat.t"),
    (lambda f: stored(f, **{"loss.flat.labels": lambda labels: labels[:1]}), "that are not all [B, L]"),
    (
        lambda f: described(f, lambda c: c["cases"]["full"].update(doc_lens=[3, 4])),
        "has block_size 1",
    ),
    (lambda f: described(f, lambda c: c["cases"]["full"].update(logits_rows=7)), "has logits_rows 7"),
    (lambda f: described(f, lambda c: c.update(cases=["full"])), "section 'cases' that is no object"),
    (lambda f: described(f, lambda c: c.update(mask_token_id="31")), "mask_token_id that is no number"),
    (lambda f: (f / "cases.safetensors").write_bytes(b"x"), "cases.safetensors cannot be read"),
]


@pytest.mark.parametrize("damage, sentence", BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_what_a_case_needs_is_asked_for(
    damage: Callable[[Path], object], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_set(tmp_path / "set")
    damage(folder)
    assert main(["verify", "golden", str(folder)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
