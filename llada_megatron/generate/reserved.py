"""Sequences that each have their room from their first forward to their last one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol

from llada_megatron.generate.pages import Pages
from llada_megatron.generate.prompt import Limits, Prompt, Result
from llada_megatron.generate.running import Running, Text


class Rooms(Protocol):
    """A decoder, as far as its batch of sequences asks it."""

    batch: int
    pages: Pages
    text: Text | None

    def check(self, number: int, prompt: Prompt, limits: Limits) -> Any:
        """The prompt, ready to be decoded; BadInput where it cannot be."""

    def take_room(self, running: Any) -> bool:
        """Give a sequence its pages; False where there are too few as long as others run."""


class Reserved[Kind: Running]:
    """The sequences at hand, and the one that waits for room."""

    def __init__(self, decoder: Rooms, prompts: Iterator[tuple[int, Prompt]], limits: Limits) -> None:
        self._rooms, self._prompts, self.limits = decoder, prompts, limits
        self.running: list[Kind] = []
        self._waiting: Kind | None = None

    def enter(self) -> list[Result]:
        """Let sequences in as long as there is room; returns what is done without a forward."""
        done, rooms = [], self._rooms
        while len(self.running) < rooms.batch and (running := self._next()) is not None:
            running.began = running.began or time.perf_counter()
            if running.is_filled:
                done.append(running.untouched(rooms.text))
                continue
            if not rooms.take_room(running):
                self._waiting = running
                break
            self.running.append(running)
        return done

    def _next(self) -> Kind | None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            return waiting
        number, prompt = next(self._prompts, (0, None))
        return None if prompt is None else self._rooms.check(number, prompt, self.limits)

    def leave(self, running: Kind) -> None:
        """A sequence is done."""
        for page in running.pages:
            self._rooms.pages.release(page)
        self.running.remove(running)

    def leave_all(self) -> None:
        """Nobody is decoded any more."""
        for running in [*self.running]:
            self.leave(running)
