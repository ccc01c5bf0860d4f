"""TransformerEngine's Python without its compiled extension, so that its modules can be built without a GPU.

Only `transformer_engine_torch` is replaced, the C++ extension; every constructor, signature and sharding
attribute is TransformerEngine's and megatron-core's own. It tells nothing about what a GPU would compute.
"""

import enum
import importlib
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CalledIntoExtension(RuntimeError):
    """Something wanted to compute, not only to construct."""


class _SelfNumbering(type):
    """A class of C++ whose members get a number when they are first named."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        setattr(cls, name, next(cls.__dict__["_numbers"]))
        return getattr(cls, name)


class StandIn(types.ModuleType):
    """`transformer_engine_torch`: its enumerations and classes exist, its functions refuse to be called."""

    # The two enumerations that TransformerEngine compares with its own copies on import.
    DType = enum.IntEnum(
        "DType", "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1", start=0
    )
    NVTE_Fused_Attn_Backend = enum.IntEnum(
        "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        is_class = name[0].isupper()
        value = _SelfNumbering(name, (), {"_numbers": itertools.count()}) if is_class else _refusing(name)
        setattr(self, name, value)
        return value


def _refusing(name: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise CalledIntoExtension(f"transformer_engine_torch.{name} needs the compiled extension and a GPU.")

    return refuse


def install(folder: Path) -> None:
    """Import transformer_engine from `folder` over the stand-in; call it before megatron.core is imported."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # common/__init__.py:488 then loads no CUDA library
    sys.path.insert(0, str(folder))
    sys.modules["transformer_engine_torch"] = StandIn("transformer_engine_torch")
    # The package loads its extension while it is imported, by a function of its own submodule `common`:
    # that is imported first, under a parent that has not run yet.
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.loader is not None
    package = sys.modules["transformer_engine"] = importlib.util.module_from_spec(spec)
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    spec.loader.exec_module(package)
    importlib.import_module("transformer_engine.pytorch")  # the package hides an ImportError of it
