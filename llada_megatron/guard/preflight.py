"""Before the model is built every node shows that it can do its part; a bad one is named within seconds.

Each rank measures without raising; what all measured is then judged alike on every rank, so that all of them
raise the same sentence. For a rank that hangs the others wait EXCHANGE_SEC, and then rank 0 names it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import socket
import statistics
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from llada_megatron.config.errors import NodeFault
from llada_megatron.config.parameters import checkpoint_bytes
from llada_megatron.config.schema import Config
from llada_megatron.record.run_dir import RunDir
from llada_megatron.runtime import device
from llada_megatron.runtime.launch import node

EXCHANGE_SEC = 60.0
"""How long to wait for a rank's measurement; the longest takes a few seconds."""
MAX_CLOCK_SKEW_SEC = 5.0
"""Clocks kept by NTP agree to milliseconds; leaving a barrier on a busy machine may take a second."""
NAMED = 8
"""A full disk is the same sentence on hundreds of nodes; so many tell enough."""
VISIBLE_SEC = 5.0
"""How long a shared file system may take to show a new file to another node."""
WRITTEN_BYTES = 1 << 22
ROUNDS = 5
"""The fastest of so many counts: what else the machine does can only make a round slower."""
SLOW = 1.5
"""What is so many times slower than the median is reported; healthy devices of a kind differ by a tenth."""
MUCH_SLOWER = 4.0
"""Such a device (throttled, shared with another job) would hold up all others: the run does not start."""
SLOW_MESSAGES = 3.0
"""A message so many times slower than the median is reported: its times vary more, the network is shared."""


@dataclass
class Report:
    """What one rank measured; problems are clauses, empty where there is none."""

    rank: int
    node: str
    host: str
    clock_skew_sec: float = 0.0
    disk_problem: str = ""
    free_bytes: int | None = None
    """For run.dir; None but on the first rank of a node."""
    checkpoints: int = 0
    """Whole ones in run.dir already."""
    product_problem: str = ""
    product_sec: float = 0.0
    all_reduce_sec: float = 0.0

    @property
    def where(self) -> str:
        """Node and rank, and the host where Slurm calls it something else."""
        host = "" if self.host == self.node else f"host {self.host}, "
        return f"{self.node} ({host}rank {self.rank})"


def check_nodes(config: Config) -> None:
    """Check clocks, run.dir, the devices' products and messages on all nodes; rank 0 prints one line.

    Needs the process group of all ranks. Raises NodeFault on every rank, naming nodes and ranks, when a
    clock is off, run.dir is not one writable place with room for the checkpoints, or a product is wrong or
    far slower than elsewhere. Smaller differences in speed are printed.
    """
    # Over the host's network: a rank whose device is broken can still say so.
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=EXCHANGE_SEC))
    try:
        own = Report(dist.get_rank(), node(), socket.gethostname())
        nodes = _gather(own.node, group)
        own.clock_skew_sec = _clock_skew_sec(group, nodes)
        if nodes.index(own.node) == own.rank:  # one rank per node
            own.free_bytes, own.checkpoints = _space(Path(config.run.dir))
        own.disk_problem = _disk_problem(Path(config.run.dir), nodes, group)
        own.product_problem, own.product_sec = _product(device.DTYPES[config.precision.dtype])
        reports = _gather(own, group, nodes)
        if problems := failures(reports, config):
            more = f" And {len(problems) - NAMED} more." if len(problems) > NAMED else ""
            sentences = " ".join(problem.sentence for problem in problems[:NAMED])
            at_fault = [problem.node for problem in problems]
            raise NodeFault(f"Preflight failed, nothing was trained. {sentences}{more}", at_fault)
        own.all_reduce_sec = _all_reduce_sec(nodes)
        reports = _gather(own, group, nodes)
    finally:
        dist.destroy_process_group(group)
    if own.rank == 0:
        for line in (summary(reports), *slow_parts(reports)):
            print(f"preflight: {line}", flush=True)


class Problem(NamedTuple):
    """What must not be, in a sentence that names node and rank."""

    node: str
    sentence: str


def failures(reports: list[Report], config: Config) -> list[Problem]:
    """Each thing that keeps the run from starting."""
    found: list[Problem] = []
    usual_sec = _usual_sec([report.product_sec for report in reports if not report.product_problem])
    wanted = max(
        1, config.checkpoint.keep_last + 1 - reports[0].checkpoints
    )  # a new one, then an old one goes
    averages = config.training.ema_decay > 0
    needed_bytes = wanted * checkpoint_bytes(config.model, config.precision, averages=averages)
    for report in reports:
        where = f"Node {report.where}"

        def problem(sentence: str, at: str = report.node) -> None:
            found.append(Problem(at, sentence))

        if abs(report.clock_skew_sec) > MAX_CLOCK_SKEW_SEC:
            direction = "ahead of" if report.clock_skew_sec > 0 else "behind"
            problem(
                f"{where}: its clock is {abs(report.clock_skew_sec):.1f} s {direction} the median of all:"
                " synchronise it (chrony, NTP)."
            )
        if report.disk_problem:
            problem(f"{where}: {report.disk_problem}.")
        elif report.free_bytes is not None and report.free_bytes < needed_bytes:
            problem(
                f"{where}: run.dir={config.run.dir} has {report.free_bytes / 1e9:.1f} GB free, {wanted} more"
                f" checkpoints take {needed_bytes / 1e9:.1f} GB: make room, lower checkpoint.keep_last or"
                " change run.dir."
            )
        if report.product_problem:
            problem(f"{where}: {report.product_problem}.")
        elif report.product_sec > MUCH_SLOWER * usual_sec:
            problem(
                f"{where}: a matrix product took {report.product_sec * 1e3:.2f} ms,"
                f" {report.product_sec / usual_sec:.1f} times the usual: leave this node out."
            )
    return found


def slow_parts(reports: list[Report]) -> list[str]:
    """One line for each rank or pair of nodes that is slower than its peers, without being a failure."""
    found = []
    usual_sec = _usual_sec([report.product_sec for report in reports])
    for report in reports:
        if report.product_sec > SLOW * usual_sec:
            found.append(
                f"warning: node {report.where} takes {report.product_sec / usual_sec:.1f} times as long as"
                " usual for a matrix product"
            )
    usual_sec = _usual_sec([report.all_reduce_sec for report in reports])
    for group in _neighbours([report.node for report in reports]):
        slowest_sec = max(reports[rank].all_reduce_sec for rank in group)
        if slowest_sec > SLOW_MESSAGES * usual_sec:
            names = " and ".join(dict.fromkeys(reports[rank].node for rank in group))
            found.append(
                f"warning: an all-reduce within {names} (ranks {group[0]} to {group[-1]}) takes"
                f" {slowest_sec / usual_sec:.1f} times as long as usual"
            )
    return found


def summary(reports: list[Report]) -> str:
    """What was found to be well, in one line."""
    products_ms = [1e3 * report.product_sec for report in reports]
    messages_ms = [1e3 * report.all_reduce_sec for report in reports]
    free_gb = min(report.free_bytes for report in reports if report.free_bytes is not None) / 1e9
    nodes = len({report.node for report in reports})
    return (
        f"{nodes} node{'s' * (nodes > 1)}, {len(reports)} rank{'s' * (len(reports) > 1)}; clocks within"
        f" {max(abs(report.clock_skew_sec) for report in reports):.2f} s; run.dir usable, {free_gb:.1f} GB"
        f" free; product {_usual_sec(products_ms):.2f} ms (slowest {max(products_ms):.2f}), all-reduce"
        f" {_usual_sec(messages_ms):.2f} ms (slowest {max(messages_ms):.2f})"
    )


def _usual_sec(seconds: list[float]) -> float:
    """The median, the lower one of two: of two ranks the faster is the measure."""
    return statistics.median_low(seconds or [0.0])


def _gather(own: Any, group: Any, nodes: list[str] | None = None) -> list[Any]:
    """What every rank gives, in rank order; NodeFault when one gives nothing in time."""
    try:
        dist.monitored_barrier(group, wait_all_ranks=True)
    except RuntimeError as error:
        silent = re.search(r"Ranks ([\d, ]+) failed to pass", str(error))  # rank 0 alone is told who
        ranks = [int(rank) for rank in silent[1].split(",")] if silent else []
        names = [f"Node {nodes[rank]} (rank {rank})" if nodes else f"Rank {rank}" for rank in ranks]
        who = ", ".join(names) or "A rank that rank 0 names"
        raise NodeFault(
            f"Preflight failed, nothing was trained. {who}: no word within {EXCHANGE_SEC:.0f} s, it hangs in"
            " its disk, its device or a message, or has ended.",
            [nodes[rank] for rank in ranks] if nodes else (),
        ) from error
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own, group=group)
    return parts


def _clock_skew_sec(group: Any, nodes: list[str]) -> float:
    """This rank's clock less the median of all, right after a barrier; the smallest of a few tries."""
    skews = []
    for _ in range(3):  # a rank that was not scheduled in time looks late once, a wrong clock every time
        dist.barrier(group)
        own_sec = time.time()
        skews.append(own_sec - statistics.median_low(_gather(own_sec, group, nodes)))
    return min(skews, key=abs)


def _space(run_dir: Path) -> tuple[int, int]:
    """Free bytes where run_dir is or will be, and its checkpoints; zeros where _disk_problem says why."""
    try:
        existing = next(path for path in (run_dir, *run_dir.absolute().parents) if os.path.exists(path))
        return shutil.disk_usage(existing).free, len(RunDir(run_dir).whole_checkpoints())
    except OSError:
        return 0, 0


def _disk_problem(run_dir: Path, nodes: list[str], group: Any) -> str:
    """What is wrong with run_dir as this rank's node sees it; one rank per node looks."""
    rank = dist.get_rank()
    is_first = nodes.index(nodes[rank]) == rank
    token = _gather(uuid.uuid4().hex, group, nodes)[0]  # a name that no file system has cached as absent
    own, first = (run_dir / f".preflight_{token}_{who}" for who in (rank, 0))
    problem = _write_problem(own, token) if is_first else ""
    first_wrote = not _gather(problem, group, nodes)[0]
    if is_first and not problem and first_wrote and not _appears(first):
        problem = (
            f"it does not see in run.dir={run_dir} what node {nodes[0]} (rank 0) wrote there: put run.dir"
            " on a file system that all nodes share"
        )
    dist.barrier(group)  # every node has looked
    if is_first:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
    return problem


def _write_problem(path: Path, token: str) -> str:
    content = (token.encode() * (WRITTEN_BYTES // len(token)))[:WRITTEN_BYTES]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != content:
            return f"run.dir={path.parent} gives back other bytes than were written: leave this node out"
    except OSError as error:
        return (
            f"run.dir={path.parent} cannot be written ({error.strerror}): choose another run.dir or mend it"
        )
    return ""


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_SEC
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _product(dtype: torch.dtype) -> tuple[str, float]:
    try:
        is_exact, seconds = product(dtype)
    except RuntimeError as error:  # what torch raises for a device that fails
        return f"its device failed ({str(error).splitlines()[0]}): leave this node out", 0.0
    return "" if is_exact else "its device computed a wrong matrix product: leave this node out", seconds


def product(dtype: torch.dtype) -> tuple[bool, float]:
    """Multiply two matrices on this rank's device; whether it was exact, and its fastest seconds.

    A[i, k] = q_i s_k where i = k (mod 16) and 0 elsewhere, B[k, j] = s_k r_j, all of them +1 or -1, so
    (A B)[i, j] = size/16 q_i r_j. Every partial sum is an integer of at most 256, which bf16 holds: the
    result is the same in any order of summation.
    """
    size = 4096 if device.on_cuda() else 512
    index = torch.arange(size, device=device.device())
    q, s, r = ((1 - 2 * (index >> shift & 1)).to(dtype) for shift in (1, 3, 5))
    a = torch.outer(q, s).where(
        (index[:, None] - index) % 16 == 0, torch.zeros((), dtype=dtype, device=q.device)
    )
    b, expected = torch.outer(s, r), torch.outer(q, r) * (size // 16)
    is_exact, fastest_sec = torch.equal(a @ b, expected), float("inf")  # the first product warms up
    for _ in range(ROUNDS):
        found, seconds = device.timed(lambda: a @ b)
        is_exact, fastest_sec = is_exact and torch.equal(found, expected), min(fastest_sec, seconds)
    return is_exact, fastest_sec


def _neighbours(nodes: list[str]) -> list[list[int]]:
    """Ranks of each node and its neighbour; with an odd number the last three nodes go together."""
    names = list(dict.fromkeys(nodes))
    pairs = [names[start : start + 2] for start in range(0, max(1, len(names) - 1), 2)]
    pairs[-1] = names[2 * (len(pairs) - 1) :]
    return [[rank for rank, name in enumerate(nodes) if name in pair] for pair in pairs]


def _all_reduce_sec(nodes: list[str]) -> float:
    """Fastest seconds of an all-reduce within this node and its neighbour: a slow link gets an address."""
    neighbours = _neighbours(nodes)
    limit = datetime.timedelta(seconds=EXCHANGE_SEC)
    group, _ = dist.new_subgroups_by_enumeration(neighbours, timeout=limit)
    message = torch.ones(WRITTEN_BYTES // 4, device=device.device())
    fastest_sec = float("inf")
    try:
        for _ in range(ROUNDS):
            dist.barrier(group)
            began = device.seconds()
            dist.all_reduce(message, group=group)
            fastest_sec = min(fastest_sec, device.seconds() - began)
    except RuntimeError as error:  # gloo's; NCCL ends the process itself, after the same limit
        own = next(ranks for ranks in neighbours if dist.get_rank() in ranks)
        names = " and ".join(dict.fromkeys(nodes[rank] for rank in own))
        reason = str(error).splitlines()[-1]
        raise NodeFault(
            f"Preflight failed, nothing was trained. An all-reduce within {names} failed ({reason}): check"
            " their network, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
        ) from error
    dist.destroy_process_group(group)
    return fastest_sec
