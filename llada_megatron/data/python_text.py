"""Real English text that every CPython carries: its language reference and its docstrings."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from llada_megatron.record.json_files import write_json_lines

MIN_DOCUMENT_BYTES = 200
_SKIPPED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def write_python_text(output_jsonl: Path) -> int:
    """Write one JSON line {"text", "source"} per document and return their number.

    A document is a topic of `pydoc_data.topics`, or all docstrings of one module of the standard library,
    read from its source without importing it. The order is that of the SHA-256 of the source's name: fixed,
    and mixed well enough that the end of the file is like the rest. The text depends on the version of
    Python.
    """
    documents = [
        (source, text)
        for source, text in [*_topics(), *_docstrings()]
        if len(text.encode(errors="replace")) >= MIN_DOCUMENT_BYTES
    ]
    documents.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
    write_json_lines(output_jsonl, ({"text": text, "source": source} for source, text in documents))
    return len(documents)


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"pydoc_data.topics/{name}", text.strip()


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        for name in files:
            if name.endswith(".py"):
                path = Path(directory, name)
                yield path.relative_to(root).as_posix(), _module_text(path)


def _module_text(path: Path) -> str:
    """Return the docstrings of a module, its classes and functions in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and samples that are no Python
        return ""
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node, clean=True)))
