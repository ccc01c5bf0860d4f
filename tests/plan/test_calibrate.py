"""Calibration finds the shares that made the measurements, and leaves alone what they do not tell."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llada_megatron import cli
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.flops import DocumentLengths
from llada_megatron.config.rules import check
from llada_megatron.config.schema import ClusterConfig, Config
from llada_megatron.plan import calibrate
from llada_megatron.plan.calibrate import FITTED, Measured

DOCUMENTS = DocumentLengths(700, 1.0)
SMALL = ("layout.micro_batch=1", "layout.global_batch=4")
LAYOUTS = {
    "one": (),
    "wide": ("model.hidden_size=512", "model.expert_hidden_size=64"),
    "experts": ("model.experts_per_token=8", "model.expert_groups_per_token=4"),
    "tp": ("layout.tp=2",),
    "dp": ("layout.processes=2",),
    "ep": ("layout.ep=2", "data.sequence_length=64"),
}


def described() -> ClusterConfig:
    guesses = {
        **dict(gemm_efficiency=0.5, grouped_gemm_efficiency=0.3, attention_efficiency=0.25),
        **dict(memory_efficiency=0.5, link_efficiency=0.5, node_latency_us=100),
    }
    return replace(compose(["experiment=bench"]).cluster, **guesses)


def true_cluster() -> ClusterConfig:
    return replace(
        described(),
        gemm_efficiency=0.8,
        grouped_gemm_efficiency=0.2,
        attention_efficiency=0.1,
        memory_efficiency=0.3,
        link_efficiency=0.9,
        node_latency_us=300,
    )


def steps_of(name: str, *overrides: str) -> list[Measured]:
    config = compose(["experiment=bench", *SMALL, *overrides])
    steps = [Measured(name, config, stage, DOCUMENTS, 0.0) for stage in check(config).stages]
    return [replace(step, seconds=step.planned(true_cluster())) for step in steps]


def write_steps(folder: Path, name: str, config: Config, steps: list[Measured]) -> Path:
    content = {
        "config": OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),
        "documents": str(DOCUMENTS),
        "cases": [{"name": step.stage.name, "seconds": step.seconds} for step in steps]
        + [{"name": "bdlm, full logits", "seconds": 9.0}],
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as the benchmarks write them, of a machine that is `true_cluster`."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, overrides in {**LAYOUTS, "pp": ("layout.pp=2",)}.items():
        steps = steps_of(name, *overrides)
        write_steps(folder, name, steps[0].config, steps)
    peak = described().peak_tflops_fp32 * 1e12
    rates = [("a", 0.2, False), ("a", 0.1, False), ("a", 0.9, True), ("b", 0.05, False), ("b", None, True)]
    results = [
        {"case": case, "flops_per_sec": share and share * peak * 14 / 12, "is_baseline": baseline}
        for case, share, baseline in rates
    ]
    attention = {"machine": {"dtype": "float32"}, "results": results}
    (folder / "attention.json").write_text(json.dumps(attention))
    return folder


def test_steps_of_several_shapes_and_layouts_tell_every_share_and_another_layout_s_time(folder: Path) -> None:
    found = calibrate.read([folder / f"{name}.json" for name in LAYOUTS])
    fitted = calibrate.fit(found, described())
    assert calibrate.worst(found.steps, fitted) < 0.02
    held_out = calibrate.read([folder / "pp.json"]).steps
    assert calibrate.worst(held_out, described()) > 0.3 > 0.03 > calibrate.worst(held_out, fitted)
    for name in ("gemm_efficiency", "grouped_gemm_efficiency", "attention_efficiency", "memory_efficiency"):
        assert getattr(fitted, name) == pytest.approx(getattr(true_cluster(), name), rel=0.15), name


def test_what_no_measurement_tells_stays_as_described(folder: Path) -> None:
    fitted = calibrate.fit(calibrate.read([folder / "one.json"]), described())
    for name in ("link_efficiency", "node_latency_us", "network_latency_us"):
        assert getattr(fitted, name) == pytest.approx(getattr(described(), name))


def test_attention_s_share_is_that_of_the_fastest_executor_over_the_cases(folder: Path) -> None:
    files = [folder / "one.json", folder / "attention.json"]
    fitted = calibrate.fit(calibrate.read(files), described())
    assert fitted.attention_efficiency == pytest.approx((0.2 * 0.05) ** 0.5)


def test_cases_that_are_no_stage_are_left_out(folder: Path) -> None:
    assert [step.stage.name for step in calibrate.read([folder / "one.json"]).steps] == ["ar", "mdlm", "bdlm"]


def test_the_command_shows_both_and_writes_a_cluster(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "mine.yaml"
    files = [str(folder / f"{name}.json") for name in ("one", "dp")]
    arguments = ["plan", "calibrate", *files, "cluster=local", "--hold-out", str(folder / "pp.json")]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Fitted: off by" in printed and "Held out: off by" in printed and "gemm_efficiency" in printed
    written = OmegaConf.to_container(OmegaConf.load(out))
    assert isinstance(written, dict)
    assert written.pop("defaults") == ["local", "_self_"] and written.pop("name") == "mine"
    assert set(written) == set(FITTED) - {"network_latency_us"}
    assert set(written) <= {field.name for field in fields(ClusterConfig)}


def test_attention_in_a_precision_without_a_peak_is_one_sentence(folder: Path) -> None:
    found = calibrate.read([folder / "one.json", folder / "attention.json"])
    with pytest.raises(BadInput, match=r"no peak for attention in bf16: set cluster\.peak_tflops"):
        calibrate.fit(replace(found, attention_dtype="bf16"), described())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"cases": []}', "holds no benchmark"),
        ('{"results": [], "machine": {"dtype": "int8"}}', "holds no benchmark"),
        ('{"results": [], "machine": {"dtype": "float32"}}', "no steps to fit"),
        (None, "does not exist"),
    ],
)
def test_bad_files_are_one_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    file = tmp_path / "bench.json"
    if content is not None:
        file.write_text(content)
    assert cli.main(["plan", "calibrate", str(file)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
