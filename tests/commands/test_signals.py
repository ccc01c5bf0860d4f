"""Signals at any moment of a run's life: the exit code tells, nothing survives, the next start goes on."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada_megatron.verify.layouts import write_corpus
from tests.training.runs import SMALL

OLD = Path(__file__).parents[1] / "old_run"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
MARK = "LLADA_TEST_LIFE"
GONE_SEC = 60.0
STEPS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("paragraphs"))


def train_command(corpus, run_dir, *overrides):
    settings = [*SMALL, f"data.path=[{corpus}]", f"run.dir={run_dir}", "training.threads=1"]
    settings += ["layout.processes=2", "layout.global_batch=4", f"training.steps={STEPS}", *overrides]
    return [sys.executable, "-m", "llada_megatron", "train", "experiment=parity", *settings]


class Life:
    """A command in a group of its own, whose descendants carry a mark."""

    def __init__(self, command, mark: Path, **options):
        self.mark, self.errors = str(mark), mark.with_suffix(".err")
        self.began = time.monotonic()
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {MARK: self.mark},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                **options,
            )

    def hears(self, number) -> bool:
        """Whether a handler of ours stands: until then it is Python's start that ends."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return False
        caught = next((line for line in status.splitlines() if line.startswith("SigCgt")), "SigCgt: 0")
        return number != signal.SIGINT or bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def send(self, number, *, to_group: bool) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to_group else os.kill)(self.process.pid, number)

    def end(self) -> int:
        """The exit code as a shell reports it."""
        code = self.process.wait(600)
        return 128 - code if code < 0 else code

    def survivors(self) -> list[str]:
        """What still lives after a while, by its command line."""
        until = time.monotonic() + GONE_SEC
        while (found := marked(self.mark)) and time.monotonic() < until:
            time.sleep(0.05)
        return found


def marked(mark: str) -> list[str]:
    wanted, found = f"{MARK}={mark}\0".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes() + b"\0":
                found.append(f"{process.name} {(process / 'cmdline').read_text()!r}")
        except OSError:
            continue
    return found


def life_sec(corpus, folder) -> float:
    life = Life(train_command(corpus, folder / "timed"), folder / "timed_mark")
    assert life.end() == 0 and not life.survivors()
    return time.monotonic() - life.began


def strike_at_random(corpus, folder, times: int) -> None:
    moments, sec = random.Random(times), life_sec(corpus, folder)
    for turn in range(times):
        number, to_group = SIGNALS[turn % 4], bool((turn + turn // 4) % 2)
        after_sec, run_dir = moments.uniform(0, sec), folder / f"run_{turn}"
        life = Life(train_command(corpus, run_dir), folder / f"mark_{turn}")
        time.sleep(after_sec)
        stood = life.hears(number)
        life.send(number, to_group=to_group)
        code, said = life.end(), life.errors.read_text()
        what = f"{number!r} to {'the group' if to_group else 'the launcher'} after {after_sec:.2f} s: {said}"
        assert code in (128 + number, 0), what
        assert not life.survivors(), what
        assert not stood or "Traceback" not in said, what
        finished = (run_dir / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").exists()
        assert code != 0 or finished, what
        again = Life(train_command(corpus, run_dir), folder / f"mark_again_{turn}")
        assert again.end() == 0, what + again.errors.read_text()
        assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == STEPS, what


@pytest.mark.slow
def test_each_signal_at_a_random_moment_leaves_no_process_and_no_lock(corpus, tmp_path):
    strike_at_random(corpus, tmp_path, len(SIGNALS))


@pytest.mark.full
def test_fifty_signals_at_random_moments_leave_no_process_and_no_lock(corpus, tmp_path):
    strike_at_random(corpus, tmp_path, 50)


@pytest.mark.slow
@pytest.mark.parametrize("after_sec", [0.6, 4.0])
def test_ranks_do_not_outlive_a_launcher_that_is_killed(corpus, tmp_path, after_sec):
    long = ["schedule.stages=[{name: a, block_size: '4', tokens: 99999999}]", "training.steps=0"]
    life = Life(train_command(corpus, tmp_path / "run", *long), tmp_path / "mark")
    if after_sec > 1:  # once it trains
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.05)
    else:  # the parent of the ranks is loading
        time.sleep(after_sec)
    life.send(signal.SIGKILL, to_group=False)
    assert life.end() == 128 + signal.SIGKILL
    assert not life.survivors()


@pytest.mark.slow
def test_what_is_ignored_from_the_start_stays_so(corpus, tmp_path):
    ignoring = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731  as nohup does
    life = Life(train_command(corpus, tmp_path / "run"), tmp_path / "mark", preexec_fn=ignoring)
    while life.process.poll() is None:
        life.send(signal.SIGHUP, to_group=True)
        time.sleep(0.2)
    assert life.end() == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_process_is_started_ends_with_its_number(corpus, tmp_path, number):
    life = Life(train_command(corpus, tmp_path / "run"), tmp_path / "mark")
    while not life.hears(signal.SIGINT):
        time.sleep(0.001)
    life.send(number, to_group=True)
    assert life.end() == 128 + number and "Traceback" not in life.errors.read_text()
    assert not life.survivors() and not (tmp_path / "run" / "metrics.jsonl").exists()


def prepare_command(text, output):
    arguments = ["data", "prepare", "--input", str(text), "--output", str(output), "--workers", "2"]
    return [sys.executable, "-m", "llada_megatron", *arguments]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_preparation_that_is_interrupted_leaves_no_worker_and_no_part_of_a_file(tmp_path, number):
    text = tmp_path / "long.jsonl"
    with text.open("w") as file:
        for _ in range(2000):
            file.write('{"text": "' + "word " * 6000 + '"}\n')
    (tmp_path / "out").mkdir()
    life = Life(prepare_command(text, tmp_path / "out" / "text"), tmp_path / "mark")
    while len(marked(life.mark)) < 4:  # itself, the tracker, two workers
        assert life.process.poll() is None
        time.sleep(0.01)
    life.send(number, to_group=True)
    assert life.end() == 128 + number and "Traceback" not in life.errors.read_text()
    assert not life.survivors() and not list((tmp_path / "out").iterdir())


def test_workers_of_a_preparation_do_not_outlive_it(tmp_path):
    text = tmp_path / "long.jsonl"
    text.write_text(('{"text": "' + "word " * 6000 + '"}\n') * 2000)
    life = Life(prepare_command(text, tmp_path / "text"), tmp_path / "mark")
    while len(marked(life.mark)) < 4:
        assert life.process.poll() is None
        time.sleep(0.01)
    life.send(signal.SIGKILL, to_group=False)
    assert life.end() == 128 + signal.SIGKILL and not life.survivors()


INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OTHER_VERBS = {
    "evaluate": ["evaluate", "RUN", "data.path=[CORPUS]", "evaluation.sequences=400", "--json", "OUT"],
    "bench attention": ["bench", "attention"],
    "plan": ["plan", "experiment=parity", "--exact", "--json", "OUT"],
    "verify resume": ["verify", "resume", "experiment=parity", "--json", "OUT"],
}


@pytest.mark.parametrize(
    ("verb", "number", "to_group"),
    [
        pytest.param(verb, number, number != signal.SIGTERM, marks=mark)
        for at, verb in enumerate(OTHER_VERBS)
        for turn, number in enumerate(INTERRUPTS)
        for mark in [pytest.mark.slow if at % len(INTERRUPTS) == turn else pytest.mark.full]
    ],
)
def test_any_verb_that_is_interrupted_leaves_no_process_and_no_part_of_a_file(
    tmp_path, verb, number, to_group
):
    shutil.copytree(OLD, tmp_path / "old")
    output = tmp_path / "out" / "found.json"
    output.parent.mkdir()
    places = {"RUN": f"{tmp_path}/old/run", "CORPUS": f"{tmp_path}/old/corpus/text", "OUT": str(output)}
    command = [sys.executable, "-m", "llada_megatron"]
    for word in OTHER_VERBS[verb]:
        for name, place in places.items():
            word = word.replace(name, place)
        command.append(word)
    life = Life(command, tmp_path / "mark")
    time.sleep(random.Random(f"{verb} {number}").uniform(0.5, 12))
    stood = life.hears(number)
    life.send(number, to_group=to_group)
    code, said = life.end(), life.errors.read_text()
    assert code in (128 + number, 0) and (not stood or "Traceback" not in said), (code, said)
    assert not life.survivors()
    for left in output.parent.iterdir():  # whole, where the signal came after it was written
        assert left == output and json.loads(left.read_text())
