"""Tasks of lm-eval by name: those of this package, of folders that a user names, and lm-eval's own."""

from __future__ import annotations

import difflib
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llada_megatron.config.errors import BadInput, Refusal
from llada_megatron.harness.requests import GENERATE

OWN = Path(__file__).parents[1] / "tasks"
FEWSHOT_SEED = 1234
"""lm-eval's own, so that its other models are shown the same examples."""


def prepare() -> None:
    """Set what lm-eval and its data sets read when they are imported: nothing is fetched from a network."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "TQDM_DISABLE"):
        os.environ[name] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["DISABLE_MULTIPROC"] = "1"  # bootstraps: its processes would inherit our handlers of signals
    try:
        import lm_eval  # noqa: F401 - asks whether it is there
    except ImportError:
        raise BadInput("lm-eval is not installed: pip install 'llada-megatron[eval]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for name in ("datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def names(folders: Sequence[Path] = ()) -> dict[str, str]:
    """Tasks of this package and of the folders by name, with the kind of what they ask."""
    manager = _manager(folders, stock=False)
    from lm_eval.tasks._yaml_loader import load_yaml

    found = {}
    for name in manager.all_subtasks:
        path = manager.task_index[name].yaml_path
        config = load_yaml(path, resolve_func=False, recursive=True) if path else {}
        found[name] = str(config.get("output_type", GENERATE))
    return found


def load(wanted: Sequence[str], folders: Sequence[Path], *, fewshot: int | None) -> dict[str, Any]:
    """What lm-eval's `evaluate` takes: `tasks` by name, and `groups` of them.

    Raises BadInput, a sentence with the task's name, for one that is not there, does not load, or whose data
    is not on this machine.
    """
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"--include-path {folder} is no folder: give one that holds tasks as .yaml files.")
        _check_files(folder)
    manager = _manager(folders, stock=False)
    if not all(_matching(manager, each) for each in wanted):
        manager = _manager(folders, stock=True)  # 14,000 of them: seconds
    chosen = []
    for each in wanted:
        if not (matching := _matching(manager, each)):
            raise BadInput(_unknown(each, manager.all_tasks))
        chosen += matching
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(chosen):
        with said_of(name), seeded():
            made = manager.load([name])
        for part in loaded:
            loaded[part].update(made.get(part, {}))
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise BadInput(f"Task {name} shows pictures or sounds, and the model reads text: remove it.")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=fewshot or 0)
        elif fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 is what a task insists on
            task.set_config(key="num_fewshot", value=fewshot)
    return loaded


def _check_files(folder: Path) -> None:
    """Raises BadInput for a file that lm-eval would pass over without a word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.glob("**/*.yaml")):
        with said_of(str(path)):
            load_yaml(path, resolve_func=False, recursive=True)


def _manager(folders: Sequence[Path], *, stock: bool) -> Any:
    from lm_eval.tasks import TaskManager

    own = [OWN] if OWN.is_dir() else []
    return TaskManager(include_path=[*own, *folders], include_defaults=stock)


def _matching(manager: Any, wanted: str) -> list[str]:
    """Names that are meant: one, those of a pattern with * or ?, or a file of a task."""
    if wanted in manager.task_index:
        return [wanted]
    if wanted.endswith(".yaml") and Path(wanted).is_file():
        return [wanted]
    return manager.match_tasks([wanted]) if set(wanted) & set("*?[") else []


def _unknown(wanted: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else "`llada eval --list` shows this package's."
    return f"There is no task {wanted}: {remedy}"


@contextmanager
def said_of(name: str, what: str = "does not load") -> Iterator[None]:
    """Whatever a task's files or data raise, as a sentence with its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Refusal:
        raise
    except Exception as error:
        sentence = " ".join(str(error).split())
        if _is_missing_data(error):
            raise BadInput(
                f"The data of task {name} is not on this machine, and nothing is fetched from a network"
                f" ({sentence[:200]}): put it into the cache of datasets, or take another task."
            ) from None
        raise BadInput(f"Task {name} {what}: {type(error).__name__}: {sentence[:300]}.") from None


def _is_missing_data(error: BaseException | None) -> bool:
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"ConnectionError", "DatasetNotFoundError", "OfflineModeIsEnabled", "FileNotFoundError"}:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def seeded() -> Iterator[None]:
    """Tasks that draw draw alike, as under lm-eval's own command; the caller's numbers go on as before."""
    kept = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def check_code(tasks: Mapping[str, Any], *, allowed: bool) -> None:
    """Raises BadInput for a task that runs what the model wrote, unless that is allowed."""
    os.environ["HF_ALLOW_CODE_EVAL"] = str(int(allowed))
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not allowed:
            raise BadInput(f"Task {name} runs programs that the model wrote: give --allow-code to let it.")
