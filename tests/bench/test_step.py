"""The step benchmark measures what it says; its figures are for docs/results/benchmarks.md, not for tests."""

import json

import pytest

from llada_megatron.bench import step
from llada_megatron.config.compose import compose
from llada_megatron.plan import calibrate
from tests.distributed import run_ranks


def prepare(folder) -> None:
    from llada_megatron.data.prepare import prepare_corpus

    (folder / "text.jsonl").write_text(json.dumps({"text": "masked tokens of a block " * 400}) + "\n")
    (folder / "text.jsonl").open("a").write(json.dumps({"text": "see the clean past " * 400}) + "\n")
    prepare_corpus([folder / "text.jsonl"], folder / "text", workers=1)


SMALL = ["model=parity", "data.split='1,1'", "data.sequence_length=128"]


@pytest.mark.slow
def test_under_a_layout_it_times_the_stages_and_calibration_reads_what_it_writes(tmp_path):
    run_ranks(prepare, tmp_path)
    overrides = [*SMALL, f"data.path=[{tmp_path}/text]", "layout.tp=2"]
    assert step.run(overrides, rounds=1, json_file=tmp_path / "tp2.json") == 0
    steps = calibrate.read([tmp_path / "tp2.json"]).steps
    assert [one.name for one in steps] == ["tp2 ar", "tp2 mdlm", "tp2 bdlm"]
    assert all(one.seconds > 0 and one.config.layout.tp == 2 for one in steps)
    assert all(one.documents.median_tokens > 1000 for one in steps)  # two of 7,200 and 10,000 bytes
    assert all(one.planned(one.config.cluster) > 0 for one in steps)


@pytest.mark.slow
def test_every_case_reports_time_memory_and_the_flops_of_its_own_rows_and_pairs(tmp_path):
    run_ranks(prepare, tmp_path)
    overrides = [*SMALL, f"data.path=[{tmp_path}/text]"]
    step.run(overrides, rounds=1, json_file=tmp_path / "bench.json")
    report = json.loads((tmp_path / "bench.json").read_text())
    cases = {case["name"]: case for case in report["cases"]}
    assert set(cases) == {"ar", "mdlm", "bdlm", f"bdlm, {step.FULL_LOGITS}"}
    assert all(case["seconds"] > 0 and 0 < case["outside_share"] < 1 for case in cases.values())
    model = compose(["experiment=bench", *overrides]).model
    full, masked = cases[f"bdlm, {step.FULL_LOGITS}"], cases["bdlm"]
    rows_saved = (full["performed_flops"] - masked["performed_flops"]) / (
        6 * model.hidden_size * model.vocab_size
    )
    # Half of x_t is masked, more or less: of 2 sequences of 2 * 128 rows about 384 need no head.
    assert rows_saved == pytest.approx(384, abs=40) and rows_saved == int(rows_saved)
    assert masked["performed_flops"] >= masked["visible_flops"]
