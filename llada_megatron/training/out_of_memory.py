"""What a step that runs out of memory says: where in the model it was, and what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer

from llada_megatron.config.errors import RunFailed
from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config, Recompute
from llada_megatron.record.run_dir import RunDir
from llada_megatron.runtime import device

ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


class OutOfMemory(RunFailed):
    """One rank has no memory left; the others do not know of it."""


class MemoryFaults:
    """Turns a lack of memory in a step into a sentence.

    A forward is told from the traceback: its innermost module. The engine of autograd calls no module, so
    each layer's output notes, when its gradient comes, that the layer's backward begins: a call of Python for
    each layer and micro-batch.
    """

    def __init__(self, config: Config, model: Sequence[torch.nn.Module]) -> None:
        self.config = config
        self.names = {module: name for chunk in model for name, module in _named(chunk)}
        self.backward_of = ""
        for module, name in self.names.items():
            if isinstance(module, TransformerLayer):
                module.register_forward_hook(partial(self._watch, name))
        if config.training.record_memory:
            device.record_memory()

    def _watch(self, name: str, _module: object, _inputs: object, outputs: Any) -> None:
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        if hidden.requires_grad:
            hidden.register_hook(partial(self._begin_backward, name))

    def _begin_backward(self, name: str, _gradient: torch.Tensor) -> None:
        self.backward_of = name

    @contextmanager
    def explained(self, schedule: Schedule, stage: Stage, step: int) -> Iterator[None]:
        """Raise OutOfMemory, on this rank alone, where what is done inside finds no memory."""
        self.backward_of = ""
        try:
            yield
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
            if not device.is_out_of_memory(error):
                raise
            rank = dist.get_rank()
            first, end = (schedule.samples_before(each) for each in (step, step + 1))
            asked = ASKED_FOR.search(str(error))
            sentence = (
                f"Out of memory on rank {rank} in step {step} of stage {stage.name} (samples {first} to"
                f" {end - 1}), {self._place(error.__traceback__)}"
                f"{f', which asked for {asked[1]}' if asked else ''}: {self._remedy(stage)}."
            )
            snapshot = RunDir(self.config.run.dir).memory_snapshot(rank)
            if device.write_memory_snapshot(snapshot):
                sentence += f" {snapshot} opens in https://pytorch.org/memory_viz."
            raise OutOfMemory(sentence) from error

    def _place(self, traceback: TracebackType | None) -> str:
        """In whose forward or backward an exception was raised."""
        name, in_backward = "", False
        while traceback is not None:
            frame = traceback.tb_frame
            in_backward |= "/torch/autograd/" in frame.f_code.co_filename
            name = self.names.get(frame.f_locals.get("self"), name) if _is_module(frame.f_locals) else name
            traceback = traceback.tb_next
        if not in_backward:
            return f"in the forward of {name}" if name else "outside of the model's layers"
        if self.backward_of and not name.startswith(f"{self.backward_of}."):
            name = self.backward_of
        return f"in the backward of {name or 'the output head and loss'}"

    def _remedy(self, stage: Stage) -> str:
        layout = self.config.layout
        ways = [f"lower the stage's micro_batch, {stage.micro_batch} now"] if stage.micro_batch > 1 else []
        if layout.recompute is not Recompute.full:
            better = "selective or full" if layout.recompute is Recompute.none else "full"
            ways.append(f"set layout.recompute={better}, {layout.recompute.value} now")
        ways.append(f"raise layout.cp, {layout.cp} now, or other axes (`llada plan --search` ranks layouts)")
        return "; ".join(ways)


def _named(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules by the names of their parameters in a checkpoint, without those that wrap the model."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return ((name, module) for name, module in chunk.named_modules() if name)


def _is_module(values: dict[str, Any]) -> bool:
    return isinstance(values.get("self"), torch.nn.Module)
