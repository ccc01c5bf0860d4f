"""The attention benchmark times only what is right; figures go to docs/results/attention.md."""

import csv
import json
from itertools import pairwise

import pytest
import torch

from llada_megatron import cli
from llada_megatron.attention import BlockDiffusionMask, registry
from llada_megatron.bench import attention
from llada_megatron.bench import attention_baselines as baselines
from llada_megatron.bench.attention import Result
from llada_megatron.bench.attention_baselines import CAUSAL, DENSE, UNFUSED
from llada_megatron.bench.attention_cases import MINI, SUITES, Case, HeadShape

SHAPE = HeadShape(4, 2, 8)
TINY = [Case(64, 4, "one", SHAPE), Case(64, 64, "one", SHAPE), Case(96, 4, "24 tokens", SHAPE)]


@pytest.fixture
def tiny(monkeypatch):
    """A suite of milliseconds, without the processes that measure memory."""
    monkeypatch.setitem(SUITES, "quick", TINY)
    monkeypatch.setattr(attention, "launch", lambda *arguments, **options: [1 << 20])
    monkeypatch.setattr(attention, "CASE_SEC", 0.0)


def bench(*arguments):
    return cli.main(["bench", "attention", "--suite", "quick", *map(str, arguments)])


def records_of(folder):
    return json.loads((folder / "attention.json").read_text())["results"]


def almost(rows, factor):
    """An executor that is off by a factor in some rows."""

    def executor(query, key, value, rectangle, scale):
        output = registry.reference_attention(query, key, value, rectangle, scale)
        return torch.cat([output[:-rows], output[-rows:] * factor])

    return executor


def test_every_executor_and_baseline_is_timed_on_every_case(tiny, tmp_path):
    assert bench("--out", tmp_path) == 0
    records = records_of(tmp_path)
    names = {*registry.executor_names(torch.device("cpu"), torch.float32, 64), DENSE, UNFUSED, CAUSAL}
    assert {(r["case"], r["executor"]) for r in records} == {(c.name, name) for c in TINY for name in names}
    for record in records:
        assert len(record["forward"]) == len(record["backward"]) >= attention.MIN_ROUNDS
        assert record["seconds"] > 0 and record["correct"] and record["peak_bytes"] == 1 << 20
        assert (record["error"] is None) == (record["executor"] == CAUSAL)
    assert len(list(tmp_path.glob("*.png"))) == 2  # one document, many
    with open(tmp_path / "attention.csv", newline="") as file:
        assert [row["executor"] for row in csv.DictReader(file)] == [r["executor"] for r in records]


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_executor_gets_no_time_and_the_exit_code_is_1(tiny, monkeypatch, tmp_path, capsys, factor):
    monkeypatch.setitem(registry._EXECUTORS, "almost", almost(rows=1, factor=factor))
    assert bench("--out", tmp_path) == 1
    wrong = [record for record in records_of(tmp_path) if record["executor"] == "almost"]
    assert len(wrong) == len(TINY)
    assert not any(r["correct"] or r["forward"] or r["seconds"] or r["peak_bytes"] for r in wrong)
    assert "almost" in capsys.readouterr().out


def test_wrong_gradients_alone_are_wrong(tiny, monkeypatch):
    def scaled(query, key, value, rectangle, scale):
        value = value + 0.001 * (value - value.detach())
        return registry.reference_attention(query, key, value, rectangle, scale)

    monkeypatch.setitem(registry._EXECUTORS, "scaled", scaled)
    by_name = {result.executor: result for result in attention.run(TINY[:1])}
    assert by_name["reference"].correct and not by_name["scaled"].correct


def test_an_executor_that_refuses_a_case_says_why_and_fails_nothing(tiny, monkeypatch, capsys):
    def refuse(query, key, value, rectangle, scale):
        raise NotImplementedError("needs CUDA")

    monkeypatch.setitem(registry._EXECUTORS, "elsewhere", refuse)
    assert bench() == 0
    assert "needs CUDA" in capsys.readouterr().out


def test_compare_prints_every_time_against_the_earlier_one(tiny, tmp_path, capsys):
    bench("--out", tmp_path)
    report = json.loads((tmp_path / "attention.json").read_text())
    for record in report["results"]:
        record["seconds"] *= 1000 if record["executor"] == "portable" else 0.001
    report["results"].append({"case": "gone", "executor": "portable", "seconds": 1.5})
    (tmp_path / "old.json").write_text(json.dumps(report))
    capsys.readouterr()
    assert bench("--compare", tmp_path / "old.json") == 0
    changes = capsys.readouterr().out.partition("against the earlier run")[2]
    marked = [line for line in changes.splitlines() if line.endswith(("faster", "slower"))]
    assert len(marked) == len(report["results"]) - 1
    assert all(line.endswith("faster" if "portable" in line else "slower") for line in marked)
    _, of_gone = changes.split("gone")
    assert of_gone.split()[-3:] == ["portable", "1500.0", "-"]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"results": [{}]}'])
def test_a_file_that_is_no_earlier_result_is_refused_before_anything_runs(tmp_path, capsys, content):
    (tmp_path / "old.json").write_text(content)
    assert bench("--compare", tmp_path / "old.json") == cli.BAD_INPUT
    streams = capsys.readouterr()
    assert "attention.json of an earlier run" in streams.err and streams.out == ""
    assert len(streams.err.splitlines()) == 1


def test_a_missing_file_is_named(tmp_path, capsys):
    assert bench("--compare", tmp_path / "absent.json") == cli.BAD_INPUT
    assert "absent.json" in capsys.readouterr().err


def test_an_unknown_suite_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "attention", "--suite", "tpu"])
    message = capsys.readouterr().err
    assert all(suite in message for suite in SUITES)


def test_the_dense_time_of_a_case_without_one_is_extrapolated_by_pairs_from_the_longest():
    def result(length, executor, seconds):
        forward, backward = ([seconds], [0.0]) if seconds else ([], [])
        case = Case(length, 4, "one", SHAPE)
        return Result(case, executor, 100, forward=forward, backward=backward)

    results = [result(128, DENSE, 3.0), result(64, DENSE, 1.0), result(512, "portable", 2.0)]
    results.append(result(64, "portable", 0.5))
    attention._set_dense_times(results)
    assert [r.dense_sec for r in results] == [3.0, 1.0, 48.0, 1.0]
    assert [r.dense_is_extrapolated for r in results] == [False, False, True, False]
    assert results[2].speedup == 24.0


def test_the_exact_result_is_that_of_the_reference_in_float64():
    mask = BlockDiffusionMask([torch.tensor([0, 30, 90])], 4)
    torch.manual_seed(0)
    query, grad = (torch.randn(180, 1, 4, 8, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(180, 1, 2, 8, dtype=torch.float64) for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = registry.reference_attention(*inputs, mask.whole(), 8**-0.5)
    expected = [output, *torch.autograd.grad(output, inputs, grad)]
    for got, want in zip(attention._exact(mask.whole(), *inputs, grad), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_of_a_suite_has_a_mask_and_a_name_of_its_own(suite):
    cases = SUITES[suite]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        if case.length <= 4096:
            assert attention._mask(case).length == case.length
        boundaries = case.cu_seqlens()
        assert boundaries[0] == 0 and boundaries[-1] == case.length
        assert all(start < stop for start, stop in pairwise(boundaries))


@pytest.mark.slow
def test_the_quick_suite_runs_with_memory(tmp_path):
    assert bench("--out", tmp_path) == 0
    records = records_of(tmp_path)
    assert all(record["peak_bytes"] > 0 for record in records)
    peak = {r["executor"]: r["peak_bytes"] for r in records if r["case"] == SUITES["quick"][1].name}
    assert peak["portable"] < peak[UNFUSED] / 2


def test_on_a_gpu_the_unfused_baselines_go_as_far_as_its_memory(monkeypatch):
    monkeypatch.setattr(baselines.device, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: name == "transformer_engine")
    unfused = {baselines.UNFUSED, baselines.TRANSFORMER_ENGINE}
    for length, fitting in ((8192, {*baselines.NAMES}), (16384, {*baselines.NAMES} - unfused)):
        assert {*baselines.fitting(Case(length, 32, "one", MINI), torch.bfloat16)} == fitting
