"""What a job has done so far, as lines of JSON in a file that another start goes on from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llada_megatron.config.errors import BadInput


class PartialFile:
    """A first line that says whose lines follow, and a line for whatever is done, written as it comes.

    What was being written when the job ended is left out. Raises BadInput where the lines are another job's.
    """

    def __init__(self, path: Path, identity: str, option: str) -> None:
        """option: the one that names the file which this one becomes."""
        self.path, self._head = path, json.dumps({"job": identity})
        self.lines: list[str] = []
        """Of earlier starts, without the first one of the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            self.append(self._head)
            return
        head, *lines = path.read_text(encoding="utf-8").split("\n")
        if head and head != self._head:
            raise BadInput(
                f"{path} holds results of another command, which was interrupted: run that one again, remove"
                f" the file, or choose another {option}."
            )
        self.lines = lines[:-1]
        self._write([self._head, *self.lines])

    def append(self, line: str) -> None:
        """Something more is done."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def become(self, target: Path, lines: list[str]) -> None:
        """All is done: the target holds these lines, and this file is gone."""
        self._write(lines)
        self.path.replace(target)

    def _write(self, lines: list[str]) -> None:
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        aside.replace(self.path)
