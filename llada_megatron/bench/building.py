"""What building micro-batches beside the model costs the thread that launches the model's operations.

The thread that builds (training/ahead.py) holds Python's lock for a part of its time, for which the other one
waits when it wants to launch. A process that builds the same takes as much of the machine but no lock: the
difference is the lock's. The launches are small operations on a CPU, as many as a model launches on a GPU.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.data.packed import PackedSample
from llada_megatron.objectives.registry import objective_of

BLOCK_SIZE, VOCABULARY, DOCUMENT_TOKENS, SEQUENCES = 32, 150_000, 665, 16
LAUNCHES, BUILDS, ROUNDS = 12_000, 10, 20


def building(length: int, rounds: int = ROUNDS, builds: int = BUILDS) -> dict[str, float]:
    """Milliseconds per micro-batch of one sequence: of CPU, and by which launches take longer beside it."""
    build = builder_of(length)

    def build_some() -> None:
        for index in range(builds):
            build(index)

    own = []
    for index in range(SEQUENCES):
        began = time.thread_time()
        build(index)
        own.append(1e3 * (time.thread_time() - began))
    fork = multiprocessing.get_context("fork")
    asked, done = fork.Semaphore(0), fork.Semaphore(0)

    def serve() -> None:
        while asked.acquire():
            build_some()
            done.release()

    process = fork.Process(target=serve, daemon=True)
    process.start()

    def beside_thread() -> float:
        thread = threading.Thread(target=build_some)
        thread.start()
        took = launches()
        thread.join()
        return took

    def beside_process() -> float:
        asked.release()
        took = launches()
        done.acquire()
        return took

    launches()
    ways = {"alone": launches, "thread": beside_thread, "process": beside_process}
    times = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    process.kill()
    found = {f"L={length}: the builder's CPU, ms": statistics.median(own)}
    for name in ("thread", "process"):
        longer = statistics.median(each[name] - each["alone"] for each in times)
        found[f"L={length}: launches take longer beside a {name}, ms"] = longer / builds
    return found


def builder_of(length: int) -> Callable[[int], object]:
    """What builds the micro-batch of a sequence, by its index, as training on CUDA does."""
    stage = f"{{name: bdlm, block_size: '{BLOCK_SIZE}', tokens: {length}, objective: diffusion}}"
    model = [f"model.vocab_size={VOCABULARY}", f"model.mask_token_id={VOCABULARY - 1}"]
    config = compose(
        ["experiment=parity", f"data.sequence_length={length}", *model, f"schedule.stages=[{stage}]"]
    )
    schedule = rules.schedule_of(config)
    objective = objective_of("diffusion", config, schedule)
    random = np.random.default_rng(1)
    data = {index: _sample(length, random) for index in range(SEQUENCES)}
    return lambda index: objective.batch(
        data,  # type: ignore[arg-type]
        [index % SEQUENCES],
        schedule.stages[0],
        noise_sigma=0.01,
    ).packed()


def _sample(length: int, random: np.random.Generator) -> PackedSample:
    ends = np.maximum(1, random.lognormal(np.log(DOCUMENT_TOKENS), 1.0, length)).astype(int).cumsum()
    edges = np.concatenate([[0], ends[ends < length], [length]]).astype(np.int32)
    return PackedSample(random.integers(0, VOCABULARY - 1, length), edges)


def launches() -> float:
    """Milliseconds of LAUNCHES small operations, one after the other."""
    values, weights = torch.ones(8, 8), torch.eye(8)
    began = time.perf_counter()
    for _ in range(LAUNCHES // 4):
        values = (values @ weights).tanh().add(weights).view(8, 8)
    return 1e3 * (time.perf_counter() - began)
