"""`llada doctor`: what this machine offers a run, one line each, and how to get what is missing.

It works on a login node as well as on a compute node: nothing here needs a GPU or Slurm.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

from llada_megatron.config.choices import AttentionBackend
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.record.json_files import write_json
from llada_megatron.record.manifest import git_commit

EXAMPLE = "llada doctor --runs runs"
PYTHONS = ((3, 12), (3, 13))
DISK_TEST_BYTES = 64 << 20
COMMAND_TIMEOUT_SEC = 20.0
HEAD_DIM = 128
"""Of LLaDA2's attention."""
SLURM_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "sacct")


class State(StrEnum):
    """What a finding means for `llada train` on this machine."""

    ok = "ok"
    absent = "-"
    """Not here, and not needed on every machine."""
    missing = "MISSING"
    """Needed."""


@dataclass
class Finding:
    """One line of the report."""

    name: str
    state: State
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings to FILE as well")


def run(args: argparse.Namespace) -> int:
    """Print a line for each finding; 0 when `llada train` can run here, 1 when it needs what is missing."""
    findings = []
    for check in CHECKS:
        finding = check()
        findings.append(finding)
        show(finding)
    findings.append(disk(args.runs))
    show(findings[-1])
    missing = [finding.name for finding in findings if finding.state is State.missing]
    has_cuda = any(finding.name == "cuda" and finding.state is State.ok for finding in findings)
    where = "on CUDA devices" if has_cuda else "on the CPU"
    print(
        f"\nllada train needs: {', '.join(missing)}" if missing else f"\nllada train can run here, {where}."
    )
    described = [asdict(finding) for finding in findings]
    write_json(args.json, {"can_train": not missing, "findings": described})
    return 1 if missing else 0


def show(finding: Finding) -> None:
    """One aligned line, at once: some checks take seconds."""
    print(f"{finding.state:<8} {finding.name:<19} {finding.text}", flush=True)


def python() -> Finding:
    text = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] in PYTHONS:
        return Finding("python", State.ok, text)
    return Finding(
        "python", State.missing, f"{text}: megatron-core's helpers are for 3.12 and 3.13; make setup"
    )


def packages() -> Finding:
    """What pyproject.toml asks for, extras aside, against what is installed."""
    wrong, fitting = [], 0
    for line in importlib.metadata.requires("llada-megatron") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if not version:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        else:
            fitting += 1
    if wrong:
        return Finding("packages", State.missing, f"{'; '.join(wrong)}: make setup")
    return Finding("packages", State.ok, f"{fitting} packages are of versions that pyproject.toml asks for")


def torch() -> Finding:
    try:
        from llada_megatron.runtime import device
    except (ImportError, OSError) as error:  # OSError: one of its libraries
        return Finding("torch", State.missing, f"cannot be imported ({last_line(error)}): make setup")
    built = f"built for CUDA {device.cuda_version()}" if device.cuda_version() else "built without CUDA"
    return Finding("torch", State.ok, f"{installed('torch')}, {built}")


def cuda() -> Finding:
    """Devices as torch sees them; where it sees none, whether the driver does."""
    try:
        from llada_megatron.runtime import device
    except (ImportError, OSError) as error:
        return Finding("cuda", State.absent, f"torch cannot be asked ({last_line(error)})")
    if names := device.names():
        return Finding("cuda", State.ok, "; ".join(f"{count} x {name}" for name, count in names.items()))
    seen = output("nvidia-smi", "-L").count("GPU ")
    if seen:
        text = (
            f"the driver shows {seen} devices, torch none: update the driver, or check CUDA_VISIBLE_DEVICES"
        )
        return Finding("cuda", State.missing, text)
    return Finding("cuda", State.absent, "no device: runs train on the CPU; normal on a login node")


def collectives() -> Finding:
    try:
        import torch.distributed as dist

        from llada_megatron.runtime import device
    except (ImportError, OSError) as error:
        return Finding(
            "collectives", State.missing, f"torch cannot be asked ({last_line(error)}): make setup"
        )
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    version = device.nccl_version() if found["nccl"] else ""
    if not found["gloo"] or not found[device.backend()]:
        return Finding("collectives", State.missing, "this torch lacks gloo or nccl: make setup")
    nccl = f"nccl {version} for CUDA devices" if version else "no nccl, which CUDA devices need"
    return Finding("collectives", State.ok, f"gloo; {nccl}")


def megatron_core() -> Finding:
    """Its version, and the seam's comparison of its source with what our patches rely on."""
    try:
        from llada_megatron.runtime import mcore_cpu

        is_active = mcore_cpu.install()
        import megatron.core
        from megatron.core import parallel_state  # noqa: F401 - what every run imports first
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("megatron-core", State.missing, f"{last_line(error)}: make setup")
    seam = "the CPU seam fits it" if is_active else "unpatched, as CUDA is there"
    return Finding("megatron-core", State.ok, f"{megatron.core.__version__}, {seam}")


def transformer_engine() -> Finding:
    version = installed("transformer-engine")
    if version and importlib.util.find_spec("transformer_engine"):
        return Finding("transformer-engine", State.ok, version)
    text = (
        "not installed: faster layers, AdamW on CUDA; pip install '.[cuda]' there, or docker/Dockerfile.gpu"
    )
    return Finding("transformer-engine", State.absent, text)


def cudnn() -> Finding:
    """The library that torch brings, and the frontend that cudnn_flex and cudnn_graph need beside it."""
    try:
        from llada_megatron.runtime import device

        library = device.cudnn_version()
    except (ImportError, OSError):
        library = ""
    frontend = installed("nvidia-cudnn-frontend")
    if library and frontend:
        return Finding("cudnn", State.ok, f"{library}, frontend {frontend}")
    lacking = " and ".join([*([] if library else ["cuDNN"]), *([] if frontend else ["cuDNN's frontend"])])
    have = f"{library}; " if library else ""
    text = f"{have}without {lacking}: faster attention on CUDA; pip install '.[cuda]' there"
    return Finding("cudnn", State.absent, text)


def layers() -> Finding:
    """Which of the two sets of layers `model.layer_spec=auto` takes here."""
    return engine("layers", lambda: _start().layer_spec_line(ModelConfig()))


def optimizer() -> Finding:
    return engine("optimizer", lambda: _start().optimizer_line())


def attention() -> Finding:
    """What trains LLaDA2's heads here; no GPU trains with what a CPU falls back to."""

    def line() -> str:
        from llada_megatron.runtime import device

        dtype = device.DTYPES["bf16"]
        found = _start().training_executor(AttentionBackend.auto, dtype, HEAD_DIM)
        name, _, why = found.partition(": ")
        return f"{name}, in bf16 with a head_dim of {HEAD_DIM}" + (f": {why}" if device.on_cuda() else "")

    return engine("attention", line)


def engine(name: str, line: Callable[[], str]) -> Finding:
    """What a part of a run would be computed with here."""
    try:
        return Finding(name, State.ok, line())
    except BadInput as refused:
        return Finding(name, State.missing, str(refused))
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(name, State.missing, f"cannot be told ({last_line(error)}): make setup")


def _start() -> Any:
    from llada_megatron.training import start

    return start


def wandb() -> Finding:
    version = installed("wandb")
    if not version:
        return Finding("wandb", State.absent, "not installed: metrics.jsonl is written anyway; make setup")
    has_key = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in text_of(Path.home() / ".netrc")
    login = "logged in" if has_key else "not logged in: wandb login, or logging.wandb=offline"
    return Finding("wandb", State.ok, f"{version}, {login}")


def slurm() -> Finding:
    lacking = [program for program in SLURM_PROGRAMS if shutil.which(program) is None]
    if len(lacking) == len(SLURM_PROGRAMS):
        return Finding("slurm", State.absent, "no programs: submit from the cluster's login node")
    version = output("sbatch", "--version") or "programs"  # without a configuration it tells nothing
    if lacking:
        text = f"{version}, but no {', '.join(lacking)}: install the cluster's Slurm client"
        return Finding("slurm", State.absent, text)
    controllers = re.findall(r"^Slurmctld.* at (\S+) is UP", output("scontrol", "ping"), re.MULTILINE)
    if not controllers:
        text = f"{version}, but no controller answers: check SLURM_CONF, or submit from a login node"
        return Finding("slurm", State.absent, text)
    return Finding("slurm", State.ok, f"{version}, {' and '.join(controllers)} answers")


def containers() -> Finding:
    """What can run docker/'s images on a cluster; bare metal needs none of it."""
    found = [name for name in ("enroot", "apptainer", "singularity") if shutil.which(name)]
    if shutil.which("srun") and "--container-image" in output("srun", "--help"):
        found.append("pyxis")
    if found:
        return Finding("containers", State.ok, ", ".join(found))
    return Finding("containers", State.absent, "no pyxis, enroot or apptainer: runs need none on bare metal")


def git() -> Finding:
    if shutil.which("git") is None:
        return Finding("git", State.absent, "not installed: runs will not record their commit")
    commit = git_commit()
    if not commit:
        return Finding("git", State.absent, "this is no clone: runs will not record their commit")
    return Finding(
        "git", State.ok, f"commit {commit[:12]}{', with changes' if commit.endswith('-dirty') else ''}"
    )


def memory() -> Finding:
    found = psutil.virtual_memory()
    return Finding(
        "memory", State.ok, f"{found.total / 1e9:.0f} GB, {found.available / 1e9:.0f} GB available"
    )


def cores() -> Finding:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count()
    return Finding(
        "cores", State.ok, f"{usable}" if usable == there else f"{usable} of {there} for this process"
    )


CHECKS: tuple[Callable[[], Finding], ...] = (
    python,
    packages,
    torch,
    cuda,
    collectives,
    megatron_core,
    transformer_engine,
    cudnn,
    layers,
    optimizer,
    attention,
    wandb,
    slurm,
    containers,
    git,
    memory,
    cores,
)


def disk(runs: Path) -> Finding:
    """Free space and speed where runs are kept; what is written is removed."""
    existing = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    where = f"{runs}/" if existing == runs.absolute() else f"{runs}/ (to be made in {existing})"
    try:
        free = shutil.disk_usage(existing).free
        with tempfile.TemporaryFile(dir=existing) as file:
            began = time.perf_counter()
            file.write(os.urandom(1 << 20) * (DISK_TEST_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
    except OSError as error:
        text = f"{where} cannot be written ({error.strerror}): set run.dir to another place"
        return Finding("disk", State.missing, text)
    speed = DISK_TEST_BYTES / seconds / 1e6
    return Finding(
        "disk", State.ok, f"{where}: {free / 1e9:.0f} GB free, {speed:.0f} MB/s written and synced"
    )


def installed(package: str) -> str:
    """The version of an installed package, empty when it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def output(*command: str) -> str:
    """What a program prints, stripped; empty when it is absent, fails or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SEC)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def text_of(path: Path) -> str:
    """A file's text, empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def last_line(error: BaseException) -> str:
    """The end of an error's message, which is the part that says what happened."""
    lines = str(error).strip().splitlines()
    return lines[-1].rstrip(":.") if lines else type(error).__name__
