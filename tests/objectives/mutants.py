"""Runs in which ranks err on purpose, as a plausible bug would: what compares layouts has to see it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from llada_megatron.config.schema import Config
from tests.distributed import run_ranks

Mutant = tuple[Callable[[], AbstractContextManager[None]], Config]


def differs(found: dict[str, Any], straight: dict[str, Any]) -> bool:
    """Whether losses or norms of a run are not those of one process."""
    same = found["loss"] == pytest.approx(straight["loss"], rel=2e-6)
    return not (same and found["grad_norm"] == pytest.approx(straight["grad_norm"], rel=1e-5))


def measure_all(measure: Callable[[Config], dict[str, Any]], mutants: list[Mutant]) -> list[dict[str, Any]]:
    from llada_megatron.parallel import groups

    found = []
    for mutation, config in mutants:
        with mutation():
            found.append(measure(config))
        groups.destroy()
    return found


def run_mutants(measure: Callable[[Config], dict[str, Any]], mutants: list[Mutant]) -> list[dict[str, Any]]:
    """What the first rank measures of each mutant, all in one launch of 2 processes."""
    return run_ranks(measure_all, measure, mutants, processes=2)[0]
