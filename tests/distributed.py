"""Ranks for tests: forked from one parent that has imported megatron-core, so the import is paid once."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from llada_megatron.runtime.launch import launch

PRELOAD = "llada_megatron.training.loop"


def run_ranks(worker: Callable[..., Any], *args: Any, processes: int = 1) -> list[Any]:
    """Results of worker(*args) in rank order; worker is a function of a module, its result plain data."""
    return launch(worker, *args, processes=processes, preload=PRELOAD)


def forked() -> Any:
    """multiprocessing's context of that parent: a fork of the test's own process takes along its locks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context
