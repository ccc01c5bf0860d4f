"""What `launch/gpu_day.sh` runs: steps in order of worth, each with a process and a time of its own.

    python -m tests.gpu.day --out DIR [--minutes N] [--dry]

DIR/day.json is whole after every step, so what was found is there whenever the machine is taken away; day.md
and index.html are made of it. A step that needs more than its time is ended and the next one begins; one that
fails ends nothing. Without a CUDA device, or with --dry, each step says what it would run.

Exit codes: 0, also without a device; 1 when a step failed.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from llada_megatron.observe.page import to_html
from llada_megatron.observe.parts import Facts, Fold, Heading, Paragraph, Part, Table, Verbatim, to_markdown
from llada_megatron.record.manifest import git_commit
from tests.gpu import figures
from tests.gpu.devices import cuda_devices, why_none

MINUTES = 10
GRACE_SEC = 15.0
"""What an ended step gets to leave in order."""
LOG_LINES = 40
TESTS = "tests/gpu/"
FEW_MASKS = "test_kernels or packed and (32-8-2 or MDLM or AR or 0.5 or 2-1024 or bitwise)"
OTHER_TESTS = ("start", "surviving", "decoding", "layouts", "attention")
SMALL = ["experiment=bench", "precision=bf16", 'data.path=["{out}/python"]']
MOE_1B = [  # layers as wide as LLaDA2.0-mini's, fewer of them, with fewer experts and words
    *SMALL,
    "model=llada2_mini",
    "model.layers=5",
    "model.experts=64",
    "model.vocab_size=32768",
    "model.mask_token_id=32767",
]
TRAINS = ["schedule.stages=[{{name: bdlm, block_size: '32', tokens: 1000000000}}]"]


@dataclass(frozen=True)
class Step:
    """One command. `{out}` in it is the day's folder, `{own}` the step's own below it."""

    name: str
    shows: str
    budget_sec: int
    """Of a day of ten minutes; longer and shorter days stretch it."""
    command: list[str]
    figures: Callable[[Path], list[Part]] = lambda folder: []
    """What the page shows of the step's folder."""
    passes: tuple[int, ...] = (0,)
    """Exit codes that are no failure."""

    def folder(self, out: Path) -> Path:
        return out / self.name.replace(",", "").replace(" ", "_")


def llada(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llada_megatron", *arguments]


def tests(*arguments: str) -> list[str]:
    plugin = ["-p", "tests.gpu.results", "--results", "{own}/tests.jsonl"]
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *plugin, *arguments]


def measured(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.gpu.measured_step", "{own}", *TRAINS, *arguments]


def decodes(*options: str) -> list[str]:
    tokens = ["--new-tokens", "64", "--json", "{own}/decode.json"]
    return llada("bench", "decode", *MOE_1B, *tokens, *options)


STEPS = (
    Step(
        "machine",
        "what this machine offers, and what is missing",
        15,
        llada("doctor", "--json", "{own}/doctor.json"),
        figures.machine,
        passes=(0, 1),
    ),
    Step("text", "documents for what trains below", 15, llada("data", "python-text", "--output", "{out}")),
    Step(
        "trains",
        "20 steps have the CPU's losses, also with TransformerEngine's layers; golden numbers hold",
        150,
        tests(f"{TESTS}test_cuda.py", "-k", "not benchmark"),
        figures.tests,
    ),
    Step(
        "attention",
        "each executor against float64 under a packed mask of each kind; strides, memory, streams, compiling",
        75,
        tests(f"{TESTS}test_attention.py", f"{TESTS}test_kernels.py", "-k", FEW_MASKS),
        figures.tests,
    ),
    Step(
        "resume",
        "a run that is killed and resumed ends with the bits of one that is not",
        100,
        llada(
            *("verify", "resume", "experiment=parity", "precision.deterministic=true"),
            *("--json", "{own}/resume.json"),
        ),
        figures.resume,
    ),
    Step(
        "attention speed",
        "executors beside dense attention and TransformerEngine",
        40,
        llada("bench", "attention", "--suite", "gpu", "--out", "{own}"),
        figures.attention,
    ),
    Step(
        "step of 1B",
        "a MoE of 1B parameters, L = 4096: its step's time and memory beside the plan's, and its kernels",
        75,
        measured(*MOE_1B, "data.sequence_length=4096", "layout.micro_batch=1", "layout.global_batch=4"),
        figures.measured,
    ),
    Step(
        "step of small",
        "the preset `small`, L = 1024: bound by launches rather than by arithmetic",
        35,
        measured(*SMALL),
        figures.measured,
    ),
    Step(
        "decoding",
        "tokens a second of the 1B MoE with a cache and without",
        40,
        decodes(),
        figures.decoding,
        passes=(0, 1),  # in bf16 a tie may fall otherwise with a cache
    ),
    Step(
        "decoding, graphs",
        "the same with CUDA graphs",
        35,
        decodes("--cuda-graphs"),
        figures.decoding,
        passes=(0, 1),
    ),
    Step(
        "other tests",
        "starts, decoding, profiles, layouts; then attention under every mask",
        600,
        tests(*(f"{TESTS}test_{name}.py" for name in OTHER_TESTS)),
        figures.tests,
    ),
)


@dataclass
class Result:
    """What became of a step."""

    name: str
    shows: str
    command: str
    budget_sec: float
    state: str
    """`passed`, `failed`, `ended` (by its time) or `left out`."""
    why: str
    seconds: float = 0.0
    exit_code: int | None = None


def run(step: Step, folder: Path, command: list[str], limit_sec: float) -> Result:
    """Run a step in a session of its own, for no longer than its limit."""
    result = Result(step.name, step.shows, shlex.join(command), limit_sec, "failed", "")
    folder.mkdir(parents=True, exist_ok=True)
    # What cudnn_flex compiled for one step serves the next ones.
    kernels = {"FLEX_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}
    kernels["FLEX_ATTENTION_CUTE_DSL_CACHE_DIR"] = str(folder.parent / "kernels")
    began = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **kernels},
        )
        try:
            result.exit_code = process.wait(limit_sec)
        except subprocess.TimeoutExpired:
            result.state, result.why = "ended", f"it needs more than its {limit_sec:.0f} s"
        finally:
            end(process)
    result.seconds = time.monotonic() - began
    if result.exit_code is not None:
        result.state = "passed" if result.exit_code in step.passes else "failed"
        result.why = "" if result.state == "passed" else f"exit code {result.exit_code}"
    return result


def end(process: subprocess.Popen[bytes]) -> None:
    """End a step's whole session: first as Ctrl-C does, then for good."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SEC)
    with suppress(ProcessLookupError):  # whatever it left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def day(out: Path, minutes: float, absent: str) -> Iterator[list[Result]]:
    """Take the steps in turn; yields all results so far after each. `absent`: why none is run, if so."""
    results: list[Result] = []
    ends_at = time.monotonic() + 60 * minutes
    for step in STEPS:
        own = step.folder(out)
        command = [word.format(out=out, own=own) for word in step.command]
        left = ends_at - time.monotonic() - GRACE_SEC
        limit = min(step.budget_sec * minutes / MINUTES, left)
        why = absent or ("the day's time is up" if limit < GRACE_SEC else "")
        if why:
            results.append(Result(step.name, step.shows, shlex.join(command), limit, "left out", why))
        else:
            print(f"{step.name}: {step.shows}; at most {limit:.0f} s", flush=True)
            results.append(run(step, own, command, limit))
        say(results[-1])
        yield results


def say(result: Result) -> None:
    why = f" ({result.why})" if result.why else ""
    print(f"{result.name}: {result.state}, {result.seconds:.0f} s{why}", flush=True)
    if result.state == "left out":
        print(f"    would run {result.command}", flush=True)


def page(record: dict[str, Any], out: Path) -> list[Part]:
    """The day as a report's parts."""
    steps = record["steps"]
    used = f"{record['seconds'] / 60:.1f} of {record['minutes']:g}"
    facts = [("device", ", ".join(record["devices"]) or "none"), ("minutes", used)]
    facts += [("commit", record["commit"] or "unknown"), ("python", record["python"])]
    columns = ["name", "shows", "state", "why", "seconds", "budget_sec"]
    rows = [[shown(each[column]) for column in columns] for each in steps]
    parts: list[Part] = [
        Heading("A day on a GPU", level=1),
        Facts(facts),
        Table(["step", "what it shows", "state", "why", "s", "at most"], rows),
    ]
    for step, each in zip(STEPS, steps, strict=False):
        own = step.folder(out)
        log = Verbatim(f"{each['command']}\n\n{tail(own / 'log.txt')}")
        parts += [Heading(step.name), Paragraph(each["shows"]), *figures_of(step, own)]
        parts.append(Fold("command and end of its log", [log]))
    return parts


def figures_of(step: Step, folder: Path) -> list[Part]:
    """What the page shows of a step's folder; a step that was ended may have left half a file."""
    try:
        return step.figures(folder)
    except (ValueError, KeyError) as error:
        return [Paragraph(f"Its files are not whole: {error!r}")]


def shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.0f}"


def tail(file: Path) -> str:
    lines = file.read_text(errors="replace").splitlines() if file.exists() else ["nothing was run"]
    return "\n".join(lines[-LOG_LINES:])


def write(path: Path, text: str) -> None:
    """Whole or not at all: the machine may be taken away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(path)


def taken_away(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="N", help=f"default {MINUTES}")
    parser.add_argument("--dry", action="store_true", help="say what would run")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, taken_away)
    devices = cuda_devices()
    absent = "--dry" if args.dry else why_none() if not devices else ""
    out, began = args.out.absolute(), time.monotonic()
    record = {"devices": devices, "python": f"{platform.python_version()}, {sys.executable}"}
    record |= {"commit": git_commit(), "minutes": args.minutes}
    results: list[Result] = []
    for step in STEPS:  # an earlier day's: its runs would be gone on with
        shutil.rmtree(step.folder(out), ignore_errors=True)
    with suppress(KeyboardInterrupt):  # what is there is written
        for results in day(out, args.minutes, absent):
            record |= {"seconds": time.monotonic() - began, "steps": [asdict(each) for each in results]}
            parts = page(record, out)
            write(out / "day.json", json.dumps(record, indent=1))
            write(out / "day.md", to_markdown(parts))
            write(out / "index.html", to_html(parts))
    print(f"{out}/index.html, day.md, day.json")
    return 1 if any(each.state == "failed" for each in results) else 0


if __name__ == "__main__":
    sys.exit(main())
