"""The house's rules, read off the source: who may import whom, what stays in runtime/, how long things get.

Each rule is a function from one module's tree to its violations; the second half shows each rule a breach.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "llada_megatron"

ROOMS_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "record": {"config"},
    "runtime": {"config"},
    "jobs": {"config", "record"},
    "tasks": {"config"},
    "plan": {"config", "record"},
    "observe": {"config", "record", "jobs", "plan"},
    "parallel": {"config", "runtime"},
    "attention": {"config", "runtime", "parallel"},
    "data": {"config", "record", "runtime", "parallel"},
    "model": {"config", "runtime", "attention"},
    "guard": {"config", "record", "runtime", "parallel", "data"},
    "objectives": {"config", "record", "runtime", "parallel", "attention", "data", "model"},
    "checkpoint": {"config", "record", "runtime", "parallel", "model"},
    "convert": {"config", "record", "runtime", "attention", "data", "model", "checkpoint"},
    "generate": {"config", "runtime", "parallel", "attention", "data", "model", "checkpoint"},
    "harness": {"config", "data"},
    "evaluate": {
        "config",
        "harness",
        "runtime",
        "parallel",
        "attention",
        "data",
        "model",
        "objectives",
        "generate",
        "checkpoint",
    },
}
ROOMS_IMPORT["training"] = {*ROOMS_IMPORT} - {"jobs", "plan", "convert", "generate", "harness", "tasks"}
ROOMS_IMPORT["scaling"] = {"config", "record"}
ROOMS_IMPORT["dryrun"] = {
    "config",
    "runtime",
    "parallel",
    "data",
    "model",
    "objectives",
    "training",
}
ROOMS_IMPORT["bench"] = {
    "config", "record", "runtime", "parallel", "attention", "data", "model", "objectives", "checkpoint",
    "convert", "generate", "evaluate", "observe", "training",
}  # fmt: skip
ROOMS_IMPORT["verify"] = {
    "config", "record", "runtime", "parallel", "attention", "data", "model", "objectives", "checkpoint",
    "convert", "generate", "evaluate", "training",
}  # fmt: skip
ROOMS_IMPORT["demo"] = {"config", "record", "parallel", "convert", "evaluate", "tasks"}
ROOMS_IMPORT["cli"] = {"config"}  # verbs by name, when they are called
ROOMS_IMPORT["commands"] = {
    "config", "record", "runtime", "parallel", "data", "jobs", "plan", "observe", "scaling", "objectives",
    "checkpoint", "convert", "generate", "tasks", "harness", "evaluate", "training", "dryrun", "bench",
    "verify", "demo", "cli",
}  # fmt: skip
ROOMS_IMPORT["__main__"] = {"cli", "config", "runtime"}
ROOMS_IMPORT["__init__"] = set()

TORCH_FREE = {"config", "record", "jobs", "plan", "scaling", "harness", "tasks"}
HEAVY = {"torch", "megatron"}
STANDARD_LIBRARY_ALONE = {"record", "jobs"}
OPTIONAL_ON_GPU = {"transformer_engine", "transformer_engine_torch", "cudnn"}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS: dict[str, str] = {
    # "room/module.py:function": "why it reads better in one piece",
    "model/families/gpt.py:transformer_config": "a flat table of megatron-core's settings, nothing to divide",
}


@dataclass
class Module:
    """One source file: its path inside the package, its text and its tree."""

    path: Path
    text: str

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        self.nodes = [*ast.walk(self.tree)]

    @property
    def room(self) -> str:
        return self.path.parts[0] if len(self.path.parts) > 1 else self.path.stem

    def imports(self, top: ast.AST | None = None) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of all imports, `from a import b` as a.b, relative ones resolved."""
        for node in ast.walk(top) if top else self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                here = (PACKAGE, *self.path.with_suffix("").parts)
                base = [*here[: len(here) - node.level]] if node.level else []
                base += [node.module] if node.module else []
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)

    def names_bound_to(self, package: str) -> set[str]:
        """Local names that an import binds to `package` or to something in it."""
        names = set()
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == package:
                        names.add(alias.asname or package)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
                names |= {alias.asname or alias.name for alias in node.names}
        return names


def root_name(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def cuda_outside_runtime(module: Module) -> Iterator[str]:
    if module.room == "runtime":
        return
    torch_names = module.names_bound_to("torch")
    for line, name in module.imports():
        if name == "torch.cuda" or name.startswith("torch.cuda."):
            yield f"{line}: imports {name}"
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and root_name(node) in torch_names:
            yield f"{node.lineno}: torch.cuda"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            yield f"{node.lineno}: .cuda()"


def megatron_patched_outside_runtime(module: Module) -> Iterator[str]:
    if module.room == "runtime":
        return
    megatron_names = module.names_bound_to("megatron")
    for line, name in module.imports():
        if name.startswith("unittest"):
            yield f"{line}: imports {name}"
    for node in module.nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            if root_name(node) in megatron_names:
                yield f"{node.lineno}: assigns to {ast.unparse(node)}"
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if ast.unparse(node.value) == "sys.modules" or root_name(node) in megatron_names:
                yield f"{node.lineno}: assigns to {ast.unparse(node)}"
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("setattr", "delattr")
            and root_name(node.args[0]) in megatron_names
        ):
            yield f"{node.lineno}: {ast.unparse(node)}"


def runs_on_import(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements that an import of the module executes: not in functions, not for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from runs_on_import(node)


def gpu_libraries_at_import(module: Module) -> Iterator[str]:
    for statement in runs_on_import(module.tree):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for line, name in module.imports(statement):
                if name.split(".")[0] in OPTIONAL_ON_GPU:
                    yield f"{line}: imports {name} at module level"


def arrows_against_the_grain(module: Module) -> Iterator[str]:
    if module.room not in ROOMS_IMPORT:
        yield f"1: room {module.room} has no row in ROOMS_IMPORT"
        return
    for line, name in module.imports():
        package, _, inside = name.partition(".")
        room = inside.partition(".")[0]
        if (
            package == PACKAGE
            and room in ROOMS_IMPORT
            and room not in {module.room, *ROOMS_IMPORT[module.room]}
        ):
            yield f"{line}: {module.room} imports {room}"


def heavy_imports_in_torch_free_rooms(module: Module) -> Iterator[str]:
    if module.room in TORCH_FREE:
        for line, name in module.imports():
            if name.split(".")[0] in HEAVY:
                yield f"{line}: imports {name}"


def vague_names_and_long_files(module: Module) -> Iterator[str]:
    for part in module.path.with_suffix("").parts:
        if part.strip("_") in ("util", "utils", "common", "misc", "helper", "helpers"):
            yield f"1: {part} says nothing about what is inside"
    lines = module.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"1: {lines} lines, at most {MAX_FILE_LINES}"


def long_functions(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES and f"{module.path}:{node.name}" not in LONG_FUNCTIONS:
                yield f"{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"


def families_by_name(module: Module) -> Iterator[str]:
    """What differs between families is asked of their formulas (config/families)."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "family" for side in sides) and any(
                isinstance(side, ast.Constant | ast.Name) for side in sides
            ):
                yield f"{node.lineno}: {ast.unparse(node)}"


Rule = Callable[[Module], Iterator[str]]
RULES: list[Rule] = [
    cuda_outside_runtime,
    megatron_patched_outside_runtime,
    gpu_libraries_at_import,
    arrows_against_the_grain,
    heavy_imports_in_torch_free_rooms,
    vague_names_and_long_files,
    long_functions,
    families_by_name,
]


@cache
def package_modules() -> list[Module]:
    base = ROOT / PACKAGE
    return [Module(path.relative_to(base), path.read_text()) for path in sorted(base.rglob("*.py"))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    found = [f"{PACKAGE}/{module.path}:{text}" for module in package_modules() for text in rule(module)]
    assert not found, "\n" + "\n".join(found)


def test_every_allowed_long_function_exists_and_is_long() -> None:
    long = {
        f"{module.path}:{node.name}"
        for module in package_modules()
        for node in module.nodes
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not LONG_FUNCTIONS.keys() - long


def arrows() -> dict[str, set[str]]:
    """Which rooms each room imports, as the source stands."""
    graph: dict[str, set[str]] = {room: set() for room in ROOMS_IMPORT}
    for module in package_modules():
        rooms = {name.split(".")[1] for _, name in module.imports() if name.startswith(f"{PACKAGE}.")}
        graph[module.room].update(rooms & ROOMS_IMPORT.keys() - {module.room})
    return graph


def test_rooms_import_each_other_in_no_circle() -> None:
    TopologicalSorter(arrows()).prepare()  # raises CycleError, which names the circle


def test_every_allowed_arrow_is_used() -> None:
    used = arrows()
    assert {
        room: sorted(ROOMS_IMPORT[room] - used[room])
        for room in ROOMS_IMPORT
        if ROOMS_IMPORT[room] - used[room]
    } == {}


@pytest.mark.parametrize("room", sorted(STANDARD_LIBRARY_ALONE))
def test_the_room_needs_the_standard_library_alone(room: str) -> None:
    modules = [
        f"{PACKAGE}.{room}.{path.stem}"
        for path in (ROOT / PACKAGE / room).glob("*.py")
        if path.stem != "__init__"
    ]
    code = f"import importlib; [importlib.import_module(name) for name in {modules}]"
    # -S: no site-packages, as with whatever Python a node has.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BREACHES = [
    (cuda_outside_runtime, "data/x.py", "import torch\ntorch.cuda.synchronize()"),
    (cuda_outside_runtime, "data/x.py", "from torch import cuda"),
    (cuda_outside_runtime, "data/x.py", "import torch.cuda.nvtx"),
    (cuda_outside_runtime, "data/x.py", "def move(tokens):\n    return tokens.cuda()"),
    (megatron_patched_outside_runtime, "model/x.py", "from megatron.core import mpu\nmpu.rank = 0"),
    (megatron_patched_outside_runtime, "model/x.py", "import megatron.core.a as a\na.B.c = len"),
    (megatron_patched_outside_runtime, "model/x.py", "from megatron.core.a import B\nsetattr(B, 'c', len)"),
    (megatron_patched_outside_runtime, "model/x.py", "import megatron.core\ndel megatron.core.a"),
    (megatron_patched_outside_runtime, "model/x.py", "import sys\nsys.modules['apex'] = None"),
    (megatron_patched_outside_runtime, "model/x.py", "from unittest import mock"),
    (
        gpu_libraries_at_import,
        "model/x.py",
        "try:\n    import transformer_engine.pytorch as te\nexcept ImportError: ...",
    ),
    (gpu_libraries_at_import, "attention/x.py", "class A:\n    from cudnn import pygraph"),
    (arrows_against_the_grain, "config/x.py", "from llada_megatron.runtime import device"),
    (arrows_against_the_grain, "data/x.py", "def f():\n    import llada_megatron.model.specs"),
    (arrows_against_the_grain, "model/x.py", "from ..training import step"),
    (arrows_against_the_grain, "model/__init__.py", "from llada_megatron import cli"),
    (arrows_against_the_grain, "attic/x.py", ""),
    (heavy_imports_in_torch_free_rooms, "plan/x.py", "def f():\n    import torch"),
    (heavy_imports_in_torch_free_rooms, "config/x.py", "from torch import nn"),
    (vague_names_and_long_files, "model/utils.py", ""),
    (vague_names_and_long_files, "common/x.py", ""),
    (vague_names_and_long_files, "model/x.py", "\n" * (MAX_FILE_LINES + 1)),
    (long_functions, "model/x.py", "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES),
    (families_by_name, "plan/x.py", "if config.model.family == 'dlcm': ..."),
    (families_by_name, "plan/x.py", "if NAME != model.family: ..."),
]


@pytest.mark.parametrize(("rule", "path", "text"), BREACHES)
def test_the_rule_sees_a_breach(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Module(Path(path), text)))


KEPT = [
    (cuda_outside_runtime, "runtime/x.py", "import torch\ntorch.cuda.synchronize()"),
    (cuda_outside_runtime, "bench/x.py", '"""Without torch.cuda."""\nlabel = config.cuda'),
    (megatron_patched_outside_runtime, "runtime/x.py", "from megatron.core import mpu\nmpu.rank = 0"),
    (megatron_patched_outside_runtime, "model/x.py", "from megatron.core.a import B\nb = B()\nb.c = 1"),
    (gpu_libraries_at_import, "model/x.py", "def spec():\n    import transformer_engine.pytorch as te"),
    (arrows_against_the_grain, "model/x.py", "from . import specs\nfrom ..attention.mask import A"),
    (heavy_imports_in_torch_free_rooms, "data/x.py", "import torch"),
    (long_functions, "model/x.py", "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)),
    (families_by_name, "convert/x.py", "kept = [one for one in SERVED if one.builds == model.family]"),
]


@pytest.mark.parametrize(("rule", "path", "text"), KEPT)
def test_the_rule_lets_good_code_pass(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(Module(Path(path), text)))


def test_no_text_names_a_registry_or_a_machines_folders() -> None:
    # Written in two pieces, or this file would be the first to break its rule.
    banned = ["pypi" + ".org", "python" + "hosted", "/wo" + "rk/", "/ro" + "ot/"]
    own = ["Makefile", "README.md", "*.toml", "*.txt", ".ci/*"]
    own += [f"{folder}/**/*" for folder in (PACKAGE, "configs", "launch", "docker", "docs", "tests")]
    found = []
    for path in sorted(path for pattern in own for path in ROOT.glob(pattern)):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {name}" for name in banned if name in text]
    assert not found, "\n" + "\n".join(found)
