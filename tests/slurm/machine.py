"""A real Slurm on this machine: two nodes, everything in one folder, gone when it is closed.

Needs Debian's slurm-wlm and munge, and root (slurmd starts steps as the user who submits). With accounting
where accounting.py finds what it needs.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm import accounting

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
FirstJobId={first_job}
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=300
BatchStartTimeout=20
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=8000
PartitionName=main Nodes=node[1-2] Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=node[1-2] PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
UP_SEC = 60


def missing() -> str:
    """Why no Slurm can be started here; empty when one can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"Slurm is not installed: {', '.join(absent)} not found (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "a Slurm of its own needs root"


class Slurm:
    """Starts munged, slurmctld and a slurmd per node; `environment` makes Slurm's programs talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder, socket.gethostname()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        for node in ("node1", "node2"):
            (folder / f"spool.{node}").mkdir()
        ports = _free_ports(4)
        self.conf = folder / "slurm.conf"
        # Ranks meet at a port that follows from the job's number: another test's Slurm must have others.
        first_job = random.randrange(1, 60_000)
        conf = CONF.format(folder=folder, host=self.host, ports=ports, first_job=first_job)
        self.has_accounting = not accounting.missing()
        if self.has_accounting:
            conf += accounting.SLURM_CONF.format(port=ports[3], folder=folder)
        self.conf.write_text(conf)
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start_munge()
            if self.has_accounting:
                accounting.start(self, ports[3])
            self.start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
            for node in ("node1", "node2"):
                self.start_node(node)
            self._wait_until_idle()
        except RuntimeError:
            self.close()
            raise

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self.start(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def kill_node(self, node: str, *, silently: bool = False) -> None:
        """Take a node away: its slurmd and all steps on it die at once.

        silently: nobody hears how its processes ended, so srun waits until Slurm misses the node.
        """
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()
        processes = list(Path("/proc").glob("[0-9]*"))
        steps = [each for each in processes if f"SLURMD_NODENAME={node}\0" in _read(each / "environ")]
        parents = {Path("/proc") / _parent(each) for each in steps} if silently else set()
        candidates = parents | {each for each in processes if f"/spool.{node}" in _read(each / "maps")}
        daemons = {each for each in candidates if "slurmstepd" in _read(each / "cmdline")}
        doomed = [*daemons, *steps] if silently else sorted({*daemons, *steps}, key=processes.index)
        for process in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)

    def run(self, *command: str, timeout_sec: float = 60, check: bool = True) -> str:
        """Output of a command of Slurm's."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_sec
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} failed: {done.stderr or done.stdout}")
        return done.stdout

    def close(self) -> None:
        """End every job and daemon that this object started."""
        if "slurmctld" in self.daemons:
            self.run("scancel", "--user=root", check=False)
            time.sleep(1)
        for daemon in reversed(list(self.daemons.values())):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.start(
            "munged",
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log",
            f"--seed-file={self.folder}/munge.seed",
        )  # fmt: skip
        self.wait("munged", lambda: (self.folder / "munge.socket").exists())

    def start(self, name: str, *command: str) -> None:
        """Start a daemon, which `close` ends."""
        output = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            command, env=self.environment, stdout=output, stderr=output, start_new_session=True
        )

    def wait(self, name: str, is_up: Callable[[], object]) -> None:
        """Wait until a daemon is up; RuntimeError when one has ended, or after UP_SEC."""
        deadline = time.monotonic() + UP_SEC
        while not is_up():
            for each, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{each} ended: {(self.folder / f'{each}.out').read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not come up in {UP_SEC} s")
            time.sleep(0.1)

    def _wait_until_idle(self) -> None:
        nodes = ("sinfo", "-h", "-N", "-o", "%N %t", "-p", "main")
        self.wait("slurmctld", lambda: self.run(*nodes, check=False).count("idle") == 2)


def _parent(process: Path) -> str:
    """The number of a process's parent; 0 when it has ended."""
    lines = _read(process / "status").splitlines()
    return next((line.split()[1] for line in lines if line.startswith("PPid:")), "0")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""


def _free_ports(count: int) -> range:
    """Ports in a row: slurm.conf gives the nodes' as a range."""
    for first in range(17000, 60000, 10):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return range(first, first + count)
    raise RuntimeError(f"no {count} ports in a row are free")
