"""The process in which one generated program runs; `code_execution.py` starts it as a script.

Standard library alone, and no import of ours: it runs before and beside what it guards against. It takes its
orders as JSON from its input, closes the doors, runs the program, and only where the program came to its end
writes the token that it was given, and `passed`, to the pipe that was its output.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

FORBIDDEN = 77
"""Exit code where the hook of Python ended a program; the kernel's filter ends it with SIGSYS."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)

# What a Python program that computes asks of the kernel. Nothing here starts a process or a thread, opens a
# socket, sends a signal, changes a file or a limit. Numbers of arch/x86/entry/syscalls/syscall_64.tbl and of
# include/uapi/asm-generic/unistd.h in Linux.
# fmt: off
ALLOWED: dict[str, dict[str, int]] = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
        "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
        "rt_sigreturn": 15, "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35,
        "getitimer": 36, "setitimer": 38, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79,
        "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
        "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131,
        "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
        "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
        "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292, "getcpu": 309,
        "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439,
    },
    "aarch64": {
        "getcwd": 17, "dup": 23, "dup3": 24, "faccessat": 48, "close": 57, "getdents64": 61, "lseek": 62,
        "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73,
        "readlinkat": 78, "newfstatat": 79, "fstat": 80, "exit": 93, "exit_group": 94, "set_tid_address": 96,
        "futex": 98, "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103,
        "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
        "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134,
        "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160, "getrlimit": 163,
        "getrusage": 165, "getcpu": 168, "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174,
        "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214,
        "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
        "membarrier": 283, "statx": 291, "rseq": 293, "faccessat2": 439,
    },
}
# Allowed with some values of the second argument, and refused with EPERM otherwise: libraries live with that.
TERMINAL = [0x5401, 0x5450, 0x5451]  # TCGETS, FIONCLEX, FIOCLEX
DESCRIPTOR = [0, 1, 2, 3, 1030]  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
BY_ARGUMENT: dict[str, dict[int, list[int]]] = {
    # ioctl, fcntl, prctl, mbind, get_mempolicy, prlimit64
    "x86_64": {16: TERMINAL, 72: DESCRIPTOR, 157: [], 237: [], 239: [], 302: []},
    "aarch64": {29: TERMINAL, 25: DESCRIPTOR, 167: [], 235: [], 236: [], 261: []},
}
OPENAT = {"x86_64": 257, "aarch64": 56}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# fmt: on

# Of linux/seccomp.h, linux/filter.h and linux/prctl.h.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL_PROCESS, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
NUMBER, ARCHITECTURE, SECOND_ARGUMENT, THIRD_ARGUMENT = 0, 4, 24, 32
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
EPERM = 1


def filter_program(machine: str) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, operand) of the filter; ValueError for other machines.

    What is on no list ends the process: a program that catches the error would otherwise go on.
    """
    if machine not in ALLOWED:
        raise ValueError(f"no filter for {machine}")
    lines = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
        (EQUAL, 0, 4, OPENAT[machine]),
        (LOAD, 0, 0, THIRD_ARGUMENT),
        (ANY_BIT, 0, 1, WRITES),
        (RETURN, 0, 0, KILL_PROCESS),
        (RETURN, 0, 0, ALLOW),
    ]
    for number, values in BY_ARGUMENT[machine].items():
        lines.append((EQUAL, 0, 2 * len(values) + 2, number))
        lines.append((LOAD, 0, 0, SECOND_ARGUMENT))
        for value in values:
            lines += [(EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW)]
        lines.append((RETURN, 0, 0, ERRNO | EPERM))
    for number in ALLOWED[machine].values():
        lines += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    return [*lines, (RETURN, 0, 0, KILL_PROCESS)]


def install_filter() -> None:
    """Hand the filter to the kernel, for good; OSError or ValueError where there can be none."""
    code = b"".join(struct.pack("=HBBI", *line) for line in filter_program(os.uname().machine))
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and where they are.
    program = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(instructions)))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program))


def _prctl(option: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(option, *padded):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


BEGINNINGS = (
    "ctypes.", "fcntl.", "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.lockf",
    "os.mkdir", "os.posix_spawn", "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.setxattr",
    "os.spawn", "os.symlink", "os.system", "os.truncate", "os.utime", "pty.", "resource.setrlimit",
    "resource.prlimit", "shutil.", "signal.pthread", "socket.", "subprocess.", "_thread.start",
)  # fmt: skip
"""Of the names of Python's audit events (docs.python.org, "Audit events table")."""


def install_hook() -> None:
    """End the program where Python itself sees it do what the filter forbids. No boundary against intent."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            _, mode, flags = arguments
            forbidden = bool(flags & WRITES) or (isinstance(mode, str) and not {*mode}.isdisjoint("wax+"))
        else:
            forbidden = event.startswith(BEGINNINGS)
        if forbidden:
            os._exit(FORBIDDEN)

    sys.addaudithook(watch)


def set_limits(cpu_sec: int, memory_bytes: int) -> None:
    """Limits of this process that it cannot raise again: the filter and the hook forbid it even to root."""
    limits = {
        resource.RLIMIT_AS: (memory_bytes, memory_bytes),
        resource.RLIMIT_CPU: (cpu_sec, cpu_sec + 1),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_NPROC: (0, 0),  # of no effect on root
    }
    for kind, (soft, hard) in limits.items():
        _, most = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


def run(program: str) -> str:
    """`passed`, or the kind of the error with which the program ended."""
    try:
        exec(compile(program, "<program>", "exec"), {})
    except BaseException as error:  # SystemExit too: the tests stand at the end
        return type(error).__name__
    return "passed"


def main() -> None:
    """Read the orders, close the doors, run the program, say how it ended."""
    orders = json.load(sys.stdin)
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    set_limits(orders["cpu_sec"], orders["memory_bytes"])
    if orders["guard"] == "filter":
        install_filter()
    else:
        install_hook()
    ending = run(orders["program"])
    os.write(verdict, f"{orders['token']} {ending}".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
