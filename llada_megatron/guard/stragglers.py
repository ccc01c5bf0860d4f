"""Which ranks are slower than their peers, told by two times that do not wait for the others.

A whole step takes equally long on every rank, because its collectives wait for the slowest. So what is
compared is the time to the reduction of the gradients, among ranks of the same pipeline stage, and the time
of a matrix product (as in the preflight). Tensor, pipeline, context and expert parallelism wait inside a step
as well: there the first time tells only which group of ranks is slow, the second one which rank.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from llada_megatron.config.schema import Config
from llada_megatron.guard.preflight import SLOW, product
from llada_megatron.parallel.ranks import gathered, warn
from llada_megatron.record import events
from llada_megatron.runtime import device
from llada_megatron.runtime.launch import node


@dataclass
class Times:
    """What one rank measured in one step."""

    rank: int
    node: str
    pp_stage: int
    step_sec: float
    """From the step's begin to the reduction of its gradients."""
    product_sec: float


class Stragglers:
    """Measures every Nth step (training.straggler_every_steps; 0: none) and names slow ranks."""

    def __init__(self, config: Config, model_config: Any) -> None:
        self._every_steps = config.training.straggler_every_steps
        self._dtype = device.DTYPES[config.precision.dtype]
        self._run_dir = Path(config.run.dir)
        self._recorded: set[int] = set()
        self._began_sec: float | None = None
        self._step_sec = 0.0
        self._reduce = model_config.finalize_model_grads_func
        if self._every_steps:
            model_config.finalize_model_grads_func = self._before_reduction

    def begin(self, step: int) -> None:
        """The step begins now; every rank calls it."""
        if self._every_steps and (step + 1) % self._every_steps == 0:
            self._began_sec = device.seconds()

    def _before_reduction(self, *args: Any, **kwargs: Any) -> None:
        if self._began_sec is not None:
            self._step_sec = device.seconds() - self._began_sec
        self._reduce(*args, **kwargs)

    def report(self, step: int) -> None:
        """After a measured step rank 0 names the slow ranks in one line; every rank calls it.

        When they are others than before, the run's record says so as well.
        """
        if self._began_sec is None:
            return
        self._began_sec = None
        stage = parallel_state.get_pipeline_model_parallel_rank()
        own = Times(dist.get_rank(), node(), stage, self._step_sec, product(self._dtype)[1])
        slow = slow_ranks(gathered(own))
        if slow:
            warn(f"step {step}: {'; '.join(slow.values())}")
        if own.rank == 0 and set(slow) != self._recorded:
            self._recorded = set(slow)
            events.append(self._run_dir, "stragglers", step=step, slow=list(slow.values()))


def slow_ranks(times: list[Times]) -> dict[int, str]:
    """A clause for each rank that is slower than the median of its peers by a factor of SLOW."""
    product_sec = statistics.median_low(rank.product_sec for rank in times)
    found = {}
    for rank in times:
        step_sec = statistics.median_low(other.step_sec for other in times if other.pp_stage == rank.pp_stage)
        clauses = [
            f"{own_sec / median_sec:.1f} times the median for {what}"
            for what, own_sec, median_sec in (
                ("forward and backward", rank.step_sec, step_sec),
                ("a matrix product", rank.product_sec, product_sec),
            )
            if own_sec > SLOW * median_sec
        ]
        if clauses:
            found[rank.rank] = f"rank {rank.rank} on {rank.node} takes {' and '.join(clauses)}"
    return found
