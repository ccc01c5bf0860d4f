"""Generated programs: what computes passes, what reaches outside is ended and counts as wrong."""

import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llada_megatron.config.errors import BadInput, RunFailed
from llada_megatron.tasks import code_box, code_execution
from llada_megatron.tasks.code_execution import FILTER, HOOK, Limits, run_program, strongest_guard

SHORT = Limits(cpu_sec=1, wall_sec=20.0, memory_bytes=1 << 29)
NO_FILTER = "this kernel takes no filter of system calls"
GUARDS = [
    pytest.param(
        FILTER,
        marks=pytest.mark.skipif(strongest_guard() != FILTER, reason=NO_FILTER),
    ),
    HOOK,
]


@pytest.mark.parametrize("guard", GUARDS)
def test_a_program_that_computes_passes_and_one_that_fails_says_how(guard: str) -> None:
    computes = (
        "import collections, dataclasses, datetime, hashlib, json, math, os, random, re, time, typing\n"
        "time.sleep(0.001)\nprint(random.random(), os.getpid(), time.time())\n"
        "assert hashlib.md5(b'').hexdigest().startswith('d41d')\n"
        "assert os.path.exists(os.__file__) and open(os.__file__).read(1)\n"
    )
    assert run_program(computes, guard=guard).passed
    if guard == FILTER:  # the hook ends it, since numpy imports ctypes
        assert run_program("import numpy\nassert numpy.ones(3).sum() == 3", guard=guard).passed
    for program, reason in {
        "assert False": "failed: AssertionError",
        "1 +": "failed: SyntaxError",
        "raise SystemExit(0)": "failed: SystemExit",
        "import os; os._exit(0)": "ended itself with code 0",
        "import os; os.abort()": None,
    }.items():
        ending = run_program(program, guard=guard)
        assert not ending.passed
        assert reason in (None, ending.reason)


HOSTILE = {
    "loops": "while True: pass",
    "sleeps": "import time\nwhile True: time.sleep(1)",
    "eats memory": "hoard = []\nwhile True: hoard.append(bytes(10**7))",
    "forks": "import os\nwhile True: os.fork()",
    "starts threads": "import threading\nthreading.Thread(target=print).start()",
    "starts a shell": "import os\nos.system('true')",
    "starts a program": "import subprocess\nsubprocess.run(['true'])",
    "opens a socket": "import socket\nsocket.socket()",
    "writes outside": "open({outside!r}, 'w')",
    "appends outside": "import os\nos.open({present!r}, os.O_APPEND | os.O_RDWR)",
    "removes a file": "import os\nos.remove({present!r})",
    "moves a file": "import os\nos.replace({present!r}, {outside!r})",
    "makes a folder": "import os\nos.mkdir({outside!r})",
    "changes a mode": "import os\nos.chmod({present!r}, 0)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))",
    "floods its pipes": "import os\n"
    "for pipe in range(64):\n  try:\n    while True: os.write(pipe, b'x' * 10**5)"
    "\n  except OSError: pass",
}


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_ended_and_counts_as_wrong_and_the_rest_goes_on(
    name: str, guard: str, tmp_path: Path
) -> None:
    present, outside = tmp_path / "present", tmp_path / "outside"
    present.write_text("kept")
    program = HOSTILE[name].format(present=str(present), outside=str(outside))
    limits = Limits(1, 1.5, 1 << 29) if name in ("sleeps", "floods its pipes") else SHORT
    # An answer that hides what it tries would be right otherwise.
    hidden = "try:\n" + "".join(f"  {line}\n" for line in program.splitlines()) + "except Exception: pass\n"
    for text in (program, hidden) if name in ("forks", "opens a socket", "writes outside") else (program,):
        assert not run_program(text, limits, guard).passed
    assert present.read_text() == "kept"
    assert present.stat().st_mode & 0o777
    assert not outside.exists()
    assert run_program("pass", guard=guard).passed


def test_the_filter_knows_no_python_and_ends_system_calls_made_without_it(tmp_path: Path) -> None:
    if strongest_guard() != FILTER:
        pytest.skip(NO_FILTER)
    outside = tmp_path / "outside"
    for call in (
        "fork()",
        "socket(2, 1, 0)",
        f"creat({str(outside).encode()!r}, 511)",
        "kill(1, 0)",
        "vfork()",
    ):
        ending = run_program(f"import ctypes\nctypes.CDLL(None).{call}", guard=FILTER)
        assert ending.reason.startswith("forbidden")
    assert not outside.exists()


def test_nothing_of_a_program_is_left_when_its_time_is_over() -> None:
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
    before = children.read_text()
    run_program("import time\ntime.sleep(1000)", Limits(1, 0.5), HOOK)
    assert children.read_text() == before


def test_a_program_does_not_outlive_who_started_it() -> None:
    code = (
        "from llada_megatron.tasks.code_execution import run_program\n"
        "print('begins', flush=True)\nrun_program('import time; time.sleep(1000)', guard='hook')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "begins\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not (child := children.read_text().strip()):
        time.sleep(0.01)
    limits = Path(f"/proc/{child}/limits")
    while not re.search(
        r"Max file size +0 +0 ", limits.read_text()
    ):  # set after the signal of a parent's death
        time.sleep(0.01)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists() or ") Z " in Path(f"/proc/{child}/stat").read_text()


def test_without_permission_a_task_refuses_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_execution, "_allowed", False)
    with pytest.raises(BadInput, match=r"HumanEval runs programs that the model writes.*--allow-code"):
        code_execution.require_allowed("HumanEval")
    code_execution.allow_code()
    code_execution.require_allowed("HumanEval")


def test_a_kernel_without_filters_gets_the_hook_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def only(works: str) -> object:
        return lambda program, *, guard: code_execution.Ending(guard == works, "failed")

    monkeypatch.setattr(code_execution, "run_program", only(HOOK))
    strongest_guard.cache_clear()
    assert strongest_guard() == HOOK
    assert "limits and Python alone hold" in caplog.text
    monkeypatch.setattr(code_execution, "run_program", only("none"))
    strongest_guard.cache_clear()
    with pytest.raises(RunFailed, match="cannot be run on this machine"):
        strongest_guard()
    strongest_guard.cache_clear()


@pytest.mark.parametrize("machine", sorted(code_box.ALLOWED))
def test_the_filter_ends_what_is_not_listed_and_every_jump_stays_inside(machine: str) -> None:
    program = code_box.filter_program(machine)
    for line, (_, if_true, if_false, _) in enumerate(program):
        assert line + 1 + max(if_true, if_false) <= len(program)

    def verdict(
        number: int, second: int = 0, third: int = 0, arch: int = code_box.AUDIT_ARCH[machine]
    ) -> int:
        """What the kernel would answer: its virtual machine on struct seccomp_data."""
        data = struct.pack("=iIQ6Q", number, arch, 0, 0, second, third, 0, 0, 0)
        line, accumulator = 0, 0
        while True:
            code, if_true, if_false, operand = program[line]
            if code == code_box.RETURN:
                return operand
            if code == code_box.LOAD:
                (accumulator,) = struct.unpack_from("=I", data, operand)
                line += 1
                continue
            holds = {
                code_box.EQUAL: accumulator == operand,
                code_box.ANY_BIT: bool(accumulator & operand),
            }[code]
            line += 1 + (if_true if holds else if_false)

    listed = {*code_box.ALLOWED[machine].values()}
    partly = {*code_box.BY_ARGUMENT[machine]}
    openat = code_box.OPENAT[machine]
    assert not listed & partly
    assert not {openat} & (listed | partly)
    for number in range(600):
        answers = {
            verdict(number, second, third) for second in (0, 0x5401, 999) for third in (0, os.O_WRONLY)
        }
        if number in listed:
            assert answers == {code_box.ALLOW}
        elif number in partly:
            assert answers <= {code_box.ALLOW, code_box.ERRNO | code_box.EPERM}
            assert verdict(number, 999) == code_box.ERRNO | code_box.EPERM
        elif number != openat:
            assert answers == {code_box.KILL_PROCESS}
    assert verdict(openat, third=os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == code_box.ALLOW
    for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE):
        assert verdict(openat, third=flag) == code_box.KILL_PROCESS
    assert verdict(min(listed), arch=1) == code_box.KILL_PROCESS
    with pytest.raises(ValueError, match="no filter for riscv64"):
        code_box.filter_program("riscv64")
