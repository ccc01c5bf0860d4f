"""The verb `llada submit`: a run becomes a job. Hydra resolves here, once; the ranks load the result."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llada_megatron.commands.fewer_nodes import keep, on_fewer_nodes
from llada_megatron.commands.sweep import sweep
from llada_megatron.config import compose, rules
from llada_megatron.config.choices import Container
from llada_megatron.config.errors import BadInput
from llada_megatron.config.quantities import so_many
from llada_megatron.config.schema import Config
from llada_megatron.jobs import slurm
from llada_megatron.record import events
from llada_megatron.record.json_files import read_json, write_json
from llada_megatron.record.manifest import git_commit, git_diff, versions
from llada_megatron.record.pace import pace_of
from llada_megatron.record.run_dir import RunDir

EXAMPLE = "llada submit experiment=llada2_flash_cpt cluster=my_site --dry-run"
SOURCE = Path(__file__).resolve().parents[2]
TEMPLATE = SOURCE / "llada_megatron" / "jobs" / "train.sbatch"
SAFE_OPTION = re.compile(r"[\w.,:=@+&|()\[\]*%/-]+")
LEAD_MARGIN_SEC = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--dry-run", action="store_true", help="print the job and the plan's verdict; submit nothing"
    )
    parser.add_argument(
        "--force", action="store_true", help="submit although the plan says that it does not fit"
    )
    parser.add_argument("--after", metavar="RUN|JOB", help="start when this run or job has finished well")
    parser.add_argument(
        "--multirun", action="store_true", help="one run for each of `key=a,b`, named after the values"
    )
    parser.add_argument(
        "--max-parallel", type=int, metavar="N", help="with --multirun: so many of the runs at a time"
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="KEY=VALUE", help="hydra overrides, experiment=NAME first"
    )


def run(args: argparse.Namespace) -> int:
    """Submit every run: 0; 1 when one does not fit; raises BadInput for bad input."""
    if args.max_parallel is not None and (not args.multirun or args.max_parallel < 1):
        raise BadInput("--max-parallel N is for the runs of --multirun: give at least 1, and --multirun.")
    choices = sweep(args.overrides) if args.multirun else [args.overrides]
    if args.after:
        _job_of(args.after)  # before the first of several is submitted
    jobs: list[str] = []
    return 0 if all([submit(overrides, args, jobs) for overrides in choices]) else 1


def submit(overrides: list[str], args: argparse.Namespace, jobs: list[str]) -> bool:
    """Render, check and submit one run; False when it does not fit and `force` is not given.

    `jobs` are those of the runs before it, and gets this one's.
    """
    config = compose.compose(overrides)
    config.training.preflight = True
    run_dir = Path(config.run.dir)
    verdict = plan_verdict(config)
    job_script = render(config, lead_sec=lead_sec(run_dir, config.slurm.signal_lead_sec))
    fewer = on_fewer_nodes(config)
    print(verdict["sentence"])
    for count, (_, layout) in fewer.items():
        print(f"on {so_many(count, 'node')}: {layout}")
    fits = verdict["fits"] or args.force
    if args.dry_run:
        print(f"\n{job_script}")
    elif not fits:
        print(
            "Not submitted: change the layout (`llada plan --search ...`), or give --force.", file=sys.stderr
        )
    else:
        conditions = [f"afterok:{_job_of(args.after)}"] if args.after else []
        if args.max_parallel and len(jobs) >= args.max_parallel:  # a requeued job has not ended
            conditions.append(f"afterany:{jobs[-args.max_parallel]}")
        job = _submit(config, run_dir, job_script, verdict, fewer, overrides, conditions)
        jobs.append(job)
        print(
            f"job {job}: {config.run.name} in {run_dir}; `llada status {shlex.quote(str(run_dir))}` shows it"
        )
    return fits


def resubmit(run_dir: Path, nodes: int | None = None) -> str:
    """Submit a run again as it was submitted last, perhaps on other `nodes`; returns the job's id.

    A job that waits gets the nodes as it is, so that its place in the queue and who waits for it stay.
    """
    files = RunDir(run_dir)
    options = []
    if nodes is not None:
        if nodes not in (known := files.node_counts()):
            choice = ", ".join(map(str, known)) or "nothing: submit the run with slurm.min_nodes"
            raise BadInput(f"{run_dir} has no layout on {so_many(nodes, 'node')}: choose from {choice}.")
        options = [f"--nodes={nodes}"]
        job = (events.last(events.read(run_dir), "submitted") or {"job": ""})["job"]
        if job and slurm.state(job) == "PENDING":
            slurm.use_nodes(job, nodes, compose.load(files.config_on(nodes)).layout.processes)
            return job
    if not files.job_script.is_file():
        raise BadInput(
            f"{run_dir} was never submitted: use `llada submit`, or `llada train` on this machine."
        )
    with _only_one(run_dir):
        files.stop.unlink(missing_ok=True)
        events.append(run_dir, "resumed")
        described = read_json(files.submission_json, "use `llada submit` again")
        return _sbatch(
            run_dir, files.job_script, described["name"], described["python"], described["directory"], options
        )


def plan_verdict(config: Config) -> dict[str, Any]:
    """What `llada plan` says: fits, and one sentence. A cluster of unknown memory is not judged."""
    from llada_megatron.plan.estimate import plan
    from llada_megatron.plan.planner import Planner
    from llada_megatron.plan.topology import check_processes

    schedule = rules.check(config)
    check_processes(config)
    try:
        result = plan(Planner(config), config.layout, schedule)
    except BadInput as unknown:
        return {"fits": True, "sentence": f"no plan: {unknown}"}
    fullest = result.fullest
    word = "fits" if result.fits else "does NOT fit"
    sentence = (
        f"plan: {word}, {fullest.peak / 1e9:.1f} GB of {config.cluster.memory_gb:g} on rank {fullest.rank};"
        f" about {result.hours:,.1f} hours"
    )
    return {"fits": result.fits, "sentence": sentence}


def lead_sec(run_dir: Path, at_least: int) -> int:
    """Warning before the time limit: two steps and two saves by this run's own record, or the setting."""
    return max(at_least, int(pace_of(run_dir).stop_sec + LEAD_MARGIN_SEC))


def render(config: Config, *, lead_sec: int) -> str:
    """The batch script of a run."""
    site, cluster = config.slurm, config.cluster
    directives = {
        "account": site.account,
        "partition": site.partition,
        "qos": site.qos,
        "constraint": site.constraint,
        "time": str(site.time_limit_min or ""),
        "gpus-per-node": str(cluster.gpus_per_node) if cluster.has_gpus else "",
    }
    lines = [f"--{name}={value}" for name, value in directives.items() if value] + list(site.options)
    for line in lines:
        if not SAFE_OPTION.fullmatch(line):
            raise BadInput(f"slurm: the option {line!r} holds characters that no option of sbatch needs.")
    environment = site.environment or ("nccl" if cluster.has_gpus else "gloo")
    end_options = f"--max-failures {config.run.max_failures}"
    values = {
        "NODES": str(cluster.nodes),
        "TASKS_PER_NODE": str(cluster.gpus_per_node),
        "DIRECTIVES": "\n".join(f"#SBATCH {line}" for line in lines) or "# (no options of the site)",
        "LEAD_SEC": str(lead_sec),
        "SETUP": "\n".join(site.setup) or "# (no set-up of the site)",
        "ENVIRONMENT": f'source "$4/llada_megatron/jobs/env/{environment}.sh"',
        "SRUN": _srun_options(config),
        "COMMAND": shlex.join(_in_container(config)),
        "END_OPTIONS": end_options + " --exclude-failed-nodes" * site.exclude_failed_nodes,
    }
    text = TEMPLATE.read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _srun_options(config: Config) -> str:
    site = config.slurm
    if site.container is not Container.pyxis:
        return ""
    options = [f"--container-image={site.image}"]
    options += [f"--container-mounts={','.join(site.mounts)}"] if site.mounts else []
    return shlex.join(options)


def _in_container(config: Config) -> list[str]:
    site = config.slurm
    python = site.python or (sys.executable if site.container is Container.none else "python")
    if site.container is not Container.none and not site.image:
        raise BadInput(f"slurm.container={site.container.value} needs slurm.image.")
    if site.container is not Container.apptainer:
        return [python]
    bind = ["--bind", ",".join(site.mounts)] if site.mounts else []
    return ["apptainer", "exec", "--nv", *bind, site.image, python]


def _submit(
    config: Config,
    run_dir: Path,
    script: str,
    verdict: dict[str, Any],
    fewer: dict[int, tuple[Config, str]],
    overrides: list[str],
    conditions: list[str],
) -> str:
    files = RunDir(run_dir)
    files.submission.mkdir(parents=True, exist_ok=True)
    with _only_one(run_dir):
        compose.save(config, files.config)
        keep(run_dir, config, fewer)
        files.job_script.write_text(script)
        files.source_diff.write_text(git_diff())
        described = {
            "name": config.run.name,
            "directory": os.getcwd(),
            "python": sys.executable,
            "overrides": overrides,
            "plan": verdict,
            "fewer_nodes": {str(count): layout for count, (_, layout) in fewer.items()},
            "git_commit": git_commit(),
            "versions": versions(),
            "data": {path: _described(path) for path in config.data.path},
            "submitted_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(files.submission_json, described)
        files.stop.unlink(missing_ok=True)
        options = [f"--dependency={','.join(conditions)}"] if conditions else []
        return _sbatch(run_dir, files.job_script, config.run.name, sys.executable, os.getcwd(), options)


def _sbatch(run_dir: Path, script: Path, name: str, python: str, directory: str, options: list[str]) -> str:
    files = RunDir(run_dir.resolve())
    files.logs.mkdir(exist_ok=True)
    output = f"{files.logs}/slurm-".replace("%", "%%") + "%j.out"
    readable = re.sub(r"[^\w.=+-]+", "-", name)[:64]
    job = slurm.sbatch(
        [
            f"--job-name={readable}",
            f"--output={output}",
            *options,
            str(script),
            str(files.path),
            python,
            directory,
            str(SOURCE),
        ]
    )
    events.append(run_dir, "submitted", job=job)
    return job


@contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Refuse a second submission of a run directory, also one that is made at the same moment."""
    submitted = events.last(events.read(run_dir), "submitted")
    if submitted and slurm.is_active(submitted["job"]):
        raise BadInput(
            f"{run_dir} is already submitted as job {submitted['job']}: `llada stop` it first, or choose"
            " another run.name."
        )
    lock = RunDir(run_dir).submission_lock
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        raise BadInput(f"{run_dir} is being submitted just now; if it is not, delete {lock}.") from None
    try:
        yield
    finally:
        lock.unlink()


def _job_of(after: str) -> str:
    if after.isdigit():
        return after
    submitted = events.last(events.read(Path(after)), "submitted")
    if submitted is None:
        raise BadInput(f"--after {after}: it is neither a job's number nor a run that was submitted.")
    return submitted["job"]


def _described(path: str) -> Any:
    try:
        return json.loads(Path(f"{path}.json").read_text())
    except (OSError, ValueError):
        return None
