"""Live bytes and messages of whatever runs inside, from the operations that torch really dispatches."""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Origin(NamedTuple):
    """Where a tensor was made: a phase of the step, and the module whose forward, or its backward, ran."""

    phase: str
    module: str


class Message(NamedTuple):
    """What collectives are counted by."""

    group: str
    """megatron-core's description of the process group."""
    ranks: int
    operation: str
    phase: str


OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
}
"""By the names of c10d's operations; any other raises NotImplementedError rather than go uncounted."""
PAYLOAD_IS_INPUT = ("reduce_scatter", "all_to_all")
"""Their payload is what goes in; of the others, the first argument: what comes out, or goes both ways."""


aten = torch.ops.aten
SCALAR_BYTES = 8
ENGINE = ("_engine_run_backward", "custom_backward")
"""Python functions that torch's autograd engine is called from."""
WRAPPERS = ("inner", "_fn")
"""What torch puts around every __torch_dispatch__."""


@dataclass(slots=True)
class _Storage:
    reference: Any
    size: int
    origin: Origin
    number: int


class Recorder(TorchDispatchMode):
    """Follows storages from the operation that makes them to their end; answers collectives itself.

    `current` and `peak` are bytes. A storage that was made outside counts from the first operation that
    reads it. Numbers that the host asks of fake tensors are answered with 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.messages: defaultdict[Message, list[int]] = defaultdict(lambda: [0, 0])
        """Calls and bytes."""
        self._live: dict[int, _Storage] = {}
        self._seen = 0
        self._changes: list[tuple[Origin, int]] = []
        self._peak_at = 0
        self._phases = ["start"]
        self._modules = [""]
        self._module_of_node: dict[int, str] = {}

    # Where we are

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside; the innermost name counts."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    def during[**P, R](self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """The function as a phase."""

        @wraps(function)
        def phase(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.phase(name):
                return function(*args, **kwargs)

        return phase

    @contextmanager
    def modules(self, chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
        """Know the modules of a rank by their names while they run."""
        names = {module: _short(name) for chunk in chunks for name, module in chunk.named_modules()}

        def enter(module: torch.nn.Module, _inputs: Any) -> None:
            self._modules.append(names.get(module, self._modules[-1]))

        def leave(module: torch.nn.Module, _inputs: Any, _outputs: Any) -> None:
            self._modules.pop()

        hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(enter),
            torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _origin(self) -> Origin:
        node = torch._C._current_autograd_node()
        module = self._modules[-1]
        if node is None:
            self._module_of_node[torch.autograd._get_sequence_nr() - 1] = module
        elif not module:
            module = self._module_of_node.get(node._sequence_nr(), "")
        return Origin(self._phases[-1], module)

    # Bytes

    def mark(self) -> int:
        """The number of storages seen so far; see `since`."""
        return self._seen

    def since(self, mark: int) -> int:
        """Bytes of live storages seen after a mark, scalars left out."""
        return sum(one.size for one in self._live.values() if one.number > mark and one.size > SCALAR_BYTES)

    def forget(self) -> None:
        """Start the peak, the changes and the messages anew; what lives goes on living."""
        self.peak = self.current
        self._changes = [(one.origin, one.size) for one in self._live.values()]
        self._peak_at = len(self._changes)
        self.messages.clear()

    def at_peak(self) -> Counter[Origin]:
        """Bytes alive at the peak by where they come from."""
        found: Counter[Origin] = Counter()
        for origin, size in self._changes[: self._peak_at]:
            found[origin] += size
        return +found

    def over_time(self, points: int) -> list[int]:
        """Live bytes, the largest of each of at most `points` equal parts of the recorded time."""
        part = max(1, -(-len(self._changes) // points))
        total, largest = 0, []
        for index, (_, size) in enumerate(self._changes):
            total += size
            if index % part == 0:
                largest.append(total)
            largest[-1] = max(largest[-1], total)
        return largest

    def _change(self, origin: Origin, size: int) -> None:
        self.current += size
        self._changes.append((origin, size))
        if self.current > self.peak:
            self.peak, self._peak_at = self.current, len(self._changes)

    def seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that no operation made, such as a batch from the host; returns it."""
        self._follow(tensor, self._origin())
        return tensor

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage anew that may have another size than before; no operation tells when it changes."""
        known = self._live.get(storage._cdata)
        if known is not None and known.size != storage.nbytes():
            self._change(known.origin, storage.nbytes() - known.size)
            known.size = storage.nbytes()

    def _follow(self, tensor: torch.Tensor, origin: Origin) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None and known.reference() is not None:
            self.resized(storage)
            return

        def ended(_reference: Any) -> None:
            gone = self._live.pop(key)
            self._change(gone.origin, -gone.size)

        self._seen += 1
        self._live[key] = _Storage(weakref.ref(storage, ended), size, origin, self._seen)
        self._change(origin, size)

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            return self._collective(func, args)
        if func.namespace == "prim":  # questions about a fake tensor's device
            return func(*args, **(kwargs or {}))
        origin = self._origin()
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.add.Tensor and _called_by_engine():
            # Where two gradients meet, the engine adds in place, but never under a dispatch mode.
            func = aten.add_.Tensor
        if func is aten.index_add.default and _called_by_engine():
            func = aten.index_add_.default  # likewise where rows were chosen, into fresh zeros
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf, origin)
        return out

    def _collective(self, func: Any, args: Any) -> Any:
        name = func.overloadpacket.__name__
        if name not in OPERATIONS:
            raise NotImplementedError(f"c10d.{name} is not counted")
        group = next(
            ProcessGroup.unbox(arg)
            for arg in args
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg)
        )
        operation = OPERATIONS[name]
        if group.size() > 1:
            payload = args[operation in PAYLOAD_IS_INPUT]
            size = sum(t.numel() * t.element_size() for t in tree_leaves(payload))
            entry = self.messages[Message(str(group.group_desc), group.size(), operation, self._phases[-1])]
            entry[0] += 1
            entry[1] += size
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args)):
            return func(*args)
        results = [
            FakeWork().boxed() if "Work" in str(result.type) else args[0] for result in func._schema.returns
        ]
        return results[0] if len(results) == 1 else tuple(results)


def _called_by_engine() -> bool:
    """Whether torch's autograd engine asks for the operation itself, not a function written in Python."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in WRAPPERS and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name in ENGINE


def _short(name: str) -> str:
    """Without the wrappers' names and a layer's or an expert's number: kinds of modules, not single ones."""
    return ".".join(part for part in name.split(".") if part != "module" and not part.isdigit())
