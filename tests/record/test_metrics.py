"""The records on disk: unique steps, torn lines, strict JSON, and what is sent to the terminal and wandb."""

import json
import subprocess
import sys
import time

import pytest

from llada_megatron.cli import main
from llada_megatron.config.choices import Wandb
from llada_megatron.config.errors import BadInput
from llada_megatron.config.quantities import short_count
from llada_megatron.config.schema import LoggingConfig
from llada_megatron.observe.trackers import HEADER, Trackers, scalars, step_line
from llada_megatron.record.metrics import MetricsFile, read_jsonl


def step_record(step: int, **changes: object) -> dict:
    return {
        "step": step,
        "consumed_samples": 4 * (step + 1),
        "consumed_tokens": 1024 * (step + 1),
        "stage": "warmup-4",
        "objective": "diffusion",
        "block_size": 4,
        "loss": 3.25,
        "grad_norm": 1.5,
        "lr": 3e-4,
        "tokens_per_sec": 12345.0,
        "mfu": None,
        "load_max_over_mean": 1.2,
        "loss_by_t": [0.5 * bin for bin in range(10)],
        "loss_by_block_position": [3.0, 3.1, 3.2, 3.3],
        "skipped_steps": 0,
        "mask_row_norm": 0.9,
        "embedding_noise_sigma": 0.0,
    } | changes


def evaluation_record(step: int) -> dict:
    return {
        "step": step,
        "stage": "warmup-4",
        "bound": {"1": {"mean": 2.5, "se": 0.01, "bits_per_byte": 1.0}},
        "ar": {"nll": 2.25, "se": 0.01, "bits_per_byte": 0.9, "tokens": 4096},
        "block1_views": {"unshifted": 4.5, "shifted": 4.25, "ar_from_clean_half": 2.25},
    }


def write_steps(path, first_step: int, last_step: int) -> None:
    file = MetricsFile(path, first_step)
    for step in range(first_step, last_step + 1):
        file.write({"step": step, "from": first_step})
    file.close()


def test_every_step_is_there_once_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 9)
    write_steps(path, 6, 12)
    records = read_jsonl(path)
    assert [record["step"] for record in records] == list(range(13))
    assert [record["from"] for record in records] == [0] * 6 + [6] * 7
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resume_that_repeats_nothing_only_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 5)
    inode = path.stat().st_ino
    write_steps(path, 6, 8)
    assert path.stat().st_ino == inode
    assert [record["step"] for record in read_jsonl(path)] == list(range(9))


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', '{"stage": "caf\\udcc3'])
def test_a_torn_last_line_costs_only_itself(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 0, 2)
    with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(torn)
    assert [record["step"] for record in read_jsonl(path)][:3] == [0, 1, 2]
    write_steps(path, 3, 4)
    assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2, 3, 4]


def test_a_complete_record_without_a_newline_is_not_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    write_steps(path, 2, 2)
    assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(BadInput, match="line 2 of"):
        read_jsonl(path)


def test_a_missing_file_has_no_records(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_record_can_be_read_before_the_file_is_closed(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0}]
    file.close()


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write(
        {"step": 0, "loss": float("nan"), "by_t": [1.0, float("inf")], "bound": {"4": {"se": -float("inf")}}}
    )
    file.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 0, "loss": None, "by_t": [1.0, None], "bound": {"4": {"se": None}}}


def test_counts_keep_their_magnitude_when_shortened():
    assert [short_count(n) for n in (950, 12_345, 1.2e6, 4.1e9, 2e12)] == [
        "950",
        "12.3k",
        "1.2M",
        "4.1B",
        "2.0T",
    ]
    assert short_count(None) == "-"


def test_the_step_line_fits_80_columns_and_ends_where_the_header_ends():
    widest = step_record(10**7, stage="a-stage-with-a-long-name", loss=1234.5, block_size=131072)
    assert len(step_line(widest)) == len(HEADER) <= 80
    assert len(step_line(step_record(0, loss=None, grad_norm=None))) == len(HEADER)


def test_output_that_is_not_a_terminal_is_plain_text(tmp_path, capsys):
    trackers = Trackers(tmp_path, LoggingConfig(every_steps=2), "a-run", first_step=0)
    for step in range(4):
        trackers.log(step_record(step, stage="warmup-1" if step < 2 else "warmup-4"))
    trackers.evaluation(evaluation_record(3))
    trackers.close()
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    first_words = [line.split()[0] for line in out.splitlines()]
    assert first_words == ["step", "0", "step", "2", "evaluation", "the"]
    assert "of block 1: unshifted 4.5000, shifted 4.2500, ar_from_clean_half 2.2500" in out
    assert "block 1 2.5000 ± 0.0100, AR 2.2500" in out
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_resume_keeps_the_evaluation_at_its_step_and_drops_later_ones(tmp_path):
    # An evaluation comes before the checkpoint of the same step, so that a resume there does not repeat it.
    for first_step, steps in ((0, (0, 5, 9)), (5, (9,))):
        trackers = Trackers(tmp_path, LoggingConfig(), "a-run", first_step)
        for step in steps:
            trackers.evaluation(evaluation_record(step))
        trackers.close()
    assert [record["step"] for record in read_jsonl(tmp_path / "evaluations.jsonl")] == [0, 5, 9]


def test_wandb_gets_numbers_alone_with_a_key_for_each_item_of_a_list():
    flat = scalars(
        {"loss": 2.0, "mfu": None, "stage": "x", "by_t": [1.0, None], "bound": {"4": {"se": 0.1}}}, "e/"
    )
    assert flat == {"e/loss": 2.0, "e/by_t/0": 1.0, "e/bound/4/se": 0.1}


def test_importing_the_room_imports_none_of_the_heavy_packages():
    code = (
        "import sys, llada_megatron.commands.report, llada_megatron.observe.trackers;"
        "print(sorted({'torch', 'matplotlib', 'rich', 'wandb'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_wandb_offline_keeps_one_identity_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for first_step in (0, 2):
        trackers = Trackers(tmp_path, LoggingConfig(wandb=Wandb.offline), "a run/with: signs", first_step)
        trackers.log(step_record(first_step))
        trackers.evaluation(evaluation_record(first_step))
        trackers.close()
        ids.append((tmp_path / "wandb_id").read_text().strip())
    assert ids[0] == ids[1] and ids[0].startswith("a-run-with-signs-")
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{ids[0]}.wandb"] * 2
    deadline = time.monotonic() + 30  # wandb's writer is a process of its own and may end after finish()
    while not all(b"loss_by_t/9" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline, "wandb's files lack the record of a step"
        time.sleep(0.01)


def test_the_newest_figures_are_there_for_prometheus_and_a_hostile_name_is_one_label(tmp_path):
    logging = LoggingConfig(prometheus=True)
    trackers = Trackers(tmp_path, logging, 'a "b"\nc', first_step=0)
    for step in range(2):
        trackers.log(step_record(step))
    trackers.close()
    lines = (tmp_path / "metrics.prom").read_text().splitlines()
    assert 'llada_step{run="a \\"b\\"\\nc"} 1' in lines
    assert all(line.startswith(("# TYPE llada_", "llada_")) for line in lines)


def test_there_is_nothing_to_upload_from_a_run_without_offline_records(tmp_path, capsys):
    assert main(["sync", str(tmp_path)]) == 2
    assert "logging.wandb=offline" in capsys.readouterr().err
