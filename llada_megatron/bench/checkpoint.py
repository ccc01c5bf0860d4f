"""Seconds and memory of saving, loading and converting, against the size of the model.

Each figure is measured in a process of its own, forked from a preloaded parent, so that its peak memory is
its own: the growth of the process over what it held before.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config
from llada_megatron.record.json_files import write_json
from llada_megatron.record.manifest import Checkpoint, Manifest
from llada_megatron.runtime.launch import launch

WIDTHS = {"20M": 256, "70M": 512, "260M": 1024}
"""Hidden sizes of the `small` preset, widened; the names are parameters, about."""
ROUNDS = 3
PRELOAD = "llada_megatron.training.loop"


@dataclass
class Size:
    """What one model cost; seconds are medians over ROUNDS, memory is in bytes."""

    name: str
    parameters: int = 0
    checkpoint_bytes: int = 0
    weight_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Of the process that needed most."""
    rank_bytes: dict[str, list[int]] = field(default_factory=dict)
    """Written by each process in a save, read in a verification and in a load."""


def run(sizes: list[str], *, processes: int, directory: Path | None, json_file: Path | None) -> int:
    """Measure, print and return 0; `directory` chooses the disk.

    processes: data-parallel ones that save and load; conversions are of one.
    """
    results = []
    for name in sizes:
        with tempfile.TemporaryDirectory(prefix="llada_bench_", dir=directory) as folder:
            results.append(_measure(name, processes, Path(folder)))
    _print(results)
    write_json(json_file, [asdict(result) for result in results])
    return 0


def _measure(name: str, processes: int, folder: Path) -> Size:
    result = Size(name)
    tasks: dict[str, Callable[..., dict[str, Any]]] = {
        "save": _save,
        "save in background": _save_in_background,
        "load": _load,
        "mcore-to-hf": _to_hf,
        "hf-to-mcore": _to_mcore,
    }
    for task, worker in tasks.items():
        ranks = processes if worker in (_save, _save_in_background, _load) else 1
        found = launch(worker, _config(name, ranks), folder, processes=ranks, preload=PRELOAD)
        result.seconds |= found[0]["seconds"]
        result.peak_bytes[task] = max(each["peak_bytes"] for each in found)
        result.parameters = found[0].get("parameters", result.parameters)
        for kind in found[0].get("bytes", {}):
            result.rank_bytes[kind] = [each["bytes"][kind] for each in found]
    result.checkpoint_bytes = _bytes_below(folder / "saved")
    result.weight_bytes = _bytes_below(folder / "hf")
    return result


def _config(name: str, processes: int) -> Config:
    width = WIDTHS[name]
    widths = {"hidden_size": width, "head_dim": width // 8, "ffn_hidden_size": 3 * width}
    widths |= {"expert_hidden_size": width * 7 // 8, "shared_expert_hidden_size": width * 7 // 8}
    widths["experts_per_token"] = 4  # with 2 of 2 groups there is no Hugging Face form
    layout = [f"layout.processes={processes}", f"layout.global_batch={2 * processes}"]
    return compose(["experiment=bench", *layout, *(f"model.{key}={value}" for key, value in widths.items())])


def _save(config: Config, folder: Path) -> dict[str, Any]:
    model, optimizer = _build(config)
    peak, saver, before = _Peak(), _saver(config, in_background=False), _moved().write_chars
    times = [
        _timed(lambda: _begin_save(config, folder, model, optimizer, saver).publish()) for _ in range(ROUNDS)
    ]
    parameters = sum(p.numel() for p in model[0].parameters())
    return {
        "seconds": {"save": median(times)},
        "peak_bytes": peak.grown(),
        "parameters": parameters,
        "bytes": {"written": (_moved().write_chars - before) // ROUNDS},
    }


def _save_in_background(config: Config, folder: Path) -> dict[str, Any]:
    """The stall is what training waits for: the capture, and the publishing of what is written."""
    model, optimizer = _build(config)
    peak, stalls, totals = _Peak(), [], []
    saver = _saver(config, in_background=True)
    for _ in range(ROUNDS):
        began = time.monotonic()
        save = _begin_save(config, folder, model, optimizer, saver)
        captured = time.monotonic()
        while not save.is_written():
            time.sleep(0.01)
        written = time.monotonic()
        save.publish()
        ended = time.monotonic()
        stalls.append(captured - began + ended - written)
        totals.append(ended - began)
    seconds = {"background stall": median(stalls), "background total": median(totals)}
    return {"seconds": seconds, "peak_bytes": peak.grown()}


def _load(config: Config, folder: Path) -> dict[str, Any]:
    from llada_megatron.checkpoint import store

    model, optimizer = _build(config)
    peak, before = _Peak(), _moved().read_chars
    verify = [_timed(lambda: store.verified(Checkpoint.read(folder / "saved"))) for _ in range(ROUNDS)]
    verified = _moved().read_chars
    load = [_timed(lambda: store.load(folder / "saved", model, optimizer)) for _ in range(ROUNDS)]
    loaded = _moved().read_chars
    return {
        "seconds": {"verify": median(verify), "load": median(load)},
        "peak_bytes": peak.grown(),
        "bytes": {"verified": (verified - before) // ROUNDS, "loaded": (loaded - verified) // ROUNDS},
    }


def _to_hf(config: Config, folder: Path) -> dict[str, Any]:
    from llada_megatron.convert import conversion

    return _converted("mcore-to-hf", lambda: conversion.mcore_to_hf(str(folder / "saved"), folder / "hf"))


def _to_mcore(config: Config, folder: Path) -> dict[str, Any]:
    from llada_megatron.convert import conversion

    token = config.model.mask_token_id
    return _converted(
        "hf-to-mcore", lambda: conversion.hf_to_mcore(folder / "hf", folder / "back", mask_token_id=token)
    )


def _converted(name: str, convert: Callable[[], Any]) -> dict[str, Any]:
    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups

    groups.initialize(LayoutConfig())
    peak = _Peak()
    seconds = _timed(lambda: convert().require())
    return {"seconds": {name: seconds}, "peak_bytes": peak.grown()}


def _build(config: Config) -> tuple[Any, Any]:
    from llada_megatron.model.provider import build_model
    from llada_megatron.parallel import groups
    from llada_megatron.training.optimizer import build_optimizer, wrap

    groups.initialize(config.layout, threads=0)
    model = wrap(config, build_model(config))
    return model, build_optimizer(config, model)


def _saver(config: Config, *, in_background: bool) -> Any:
    from llada_megatron.checkpoint.store import Saver

    return Saver(threads=config.checkpoint.writer_threads, in_background=in_background)


def _begin_save(config: Config, folder: Path, model: Any, optimizer: Any, saver: Any) -> Any:
    from llada_megatron.parallel.ranks import rank

    if rank() == 0:
        shutil.rmtree(folder / "saved", ignore_errors=True)
    manifest = Manifest(config={"model": asdict(config.model)})
    return saver.save(folder / "saved", manifest, model, optimizer, carried_along={})


class _Peak:
    """Growth of the process's peak memory since now."""

    def __init__(self) -> None:
        self._before = self._peak_bytes()

    def grown(self) -> int:
        return self._peak_bytes() - self._before

    @staticmethod
    def _peak_bytes() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _moved() -> Any:
    """What this process has read and written so far, from wherever it came."""
    return psutil.Process().io_counters()


def _timed(action: Callable[[], Any]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _print(results: list[Size]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for result in results:
        table.add_column(f"{result.parameters / 1e6:,.0f}M parameters", justify="right")
    table.add_row("checkpoint", *(f"{result.checkpoint_bytes / 1e6:,.0f} MB" for result in results))
    for name in results[0].seconds:
        of_weights = name in ("mcore-to-hf", "hf-to-mcore")
        table.add_row(name, *(_rate(result, name, of_weights) for result in results))
    for name, counts in results[0].rank_bytes.items():
        if len(counts) > 1:
            table.add_row(f"{name}, per process", *(_spread(result.rank_bytes[name]) for result in results))
    for name in results[0].peak_bytes:
        table.add_row(f"memory, {name}", *(f"{result.peak_bytes[name] / 1e6:,.0f} MB" for result in results))
    Console(highlight=False).print(table)
    print(
        "\nSeconds, and 10^9 bytes of the checkpoint (conversions: of the weights) per second. A conversion"
    )
    print("reads and hashes both sides twice for its certificate. Memory is what the process grew by.")


def _spread(counts: list[int]) -> str:
    least, most = (round(count / 1e6) for count in (min(counts), max(counts)))
    return f"{least:,} MB" if least == most else f"{least:,} to {most:,} MB"


def _rate(result: Size, name: str, of_weights: bool) -> str:
    size = result.weight_bytes if of_weights else result.checkpoint_bytes
    return f"{result.seconds[name]:.2f} s  {size / result.seconds[name] / 1e9:.2f} GB/s"
