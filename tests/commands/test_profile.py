"""`llada profile` of a run that really trains, in two processes, and of one that does not."""

import gzip
import json
import signal
import subprocess
import sys
import time

import pytest

from llada_megatron.commands import profile
from llada_megatron.config.errors import BadInput
from llada_megatron.record.metrics import read_jsonl
from llada_megatron.record.run_dir import RunDir
from llada_megatron.verify.layouts import write_corpus
from tests.training.runs import LONG, SMALL, TWO

WAIT_SEC = 240


def llada(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "llada_megatron", *map(str, arguments)]


def ask(run_dir, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        llada("profile", run_dir, *options), capture_output=True, text=True, timeout=WAIT_SEC
    )


def test_a_run_is_profiled_while_it_goes_on_and_refused_when_it_is_over(tmp_path):
    files = RunDir(tmp_path / "run")
    settings = [*SMALL, f"data.path=[{write_corpus(tmp_path)}]", f"run.dir={files.path}", LONG, TWO]
    settings += ["training.threads=1", "data.sequence_length=64"]
    with open(tmp_path / "out", "w") as out:
        run = subprocess.Popen(llada("train", "experiment=parity", *settings), stdout=out, stderr=out)
    try:
        until = time.monotonic() + WAIT_SEC
        while not read_jsonl(files.metrics):
            assert run.poll() is None and time.monotonic() < until, (tmp_path / "out").read_text()
            time.sleep(0.2)
        done = ask(files.path, "--steps", 2, "--ranks", "0,1")
        again = ask(files.path, "--steps", 1, "--ranks", "1")
        other = ask(files.path, "--ranks", "0,2")
        went_on = len(read_jsonl(files.metrics))
    finally:
        run.send_signal(signal.SIGTERM)
        assert run.wait(WAIT_SEC) == 128 + signal.SIGTERM, (tmp_path / "out").read_text()
    assert done.returncode == 0, done.stderr
    first, second = sorted(files.profiles.iterdir())
    for trace in ("rank_00000.json.gz", "rank_00001.json.gz"):
        assert str(first / trace) in done.stdout
        names = [
            event.get("name")
            for event in json.loads(gzip.decompress((first / trace).read_bytes()))["traceEvents"]
        ]
        assert names.count("passes") == 2 and names.count("optimizer") == 2
    assert "rank 0" in done.stdout and "aten::" in done.stdout and "%" in done.stdout
    assert again.returncode == 0 and [each.name for each in second.glob("*.gz")] == ["rank_00001.json.gz"]
    assert other.returncode == 2 and "numbers from 0 to 1" in other.stderr
    assert len(read_jsonl(files.metrics)) >= went_on and not files.profile_request.exists()
    over = ask(files.path)
    assert over.returncode == 2 and "is not training: start it" in over.stderr


@pytest.mark.slow
def test_a_second_request_is_refused_while_one_waits(tmp_path):
    files = RunDir(tmp_path)
    profile._ask(files, {"steps": 1})
    with pytest.raises(BadInput, match="Somebody else waits"):
        profile._ask(files, {"steps": 2})
    assert json.loads(files.profile_request.read_text()) == {"steps": 1}
    assert [each.name for each in tmp_path.iterdir()] == [files.profile_request.name]
