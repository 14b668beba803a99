"""Staged slots on their way from the thread that fills them to the one that writes them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from ckptman.pipeline.arena import Arena, Slot


class StagingStopped(Exception):
    """The thread that stages failed or was interrupted: what it has staged is not the whole."""


class Stream:
    """
    A queue with an end, between two threads, that loses no slot.

    Whoever receives gives each slot back to the arena once it is written. As a context manager, left for whatever
    reason, it gives back all that was not received, and tells the sender to stop.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._changed = threading.Condition()  # guards all below
        self._slots: deque[Slot] = deque()
        self._is_ended = False
        self._failure: BaseException | None = None
        self._is_closed = False

    def put(self, slot: Slot) -> bool:
        """Send *slot*; False, and the slot is given back, if nobody receives any more."""
        with self._changed:
            if not self._is_closed:
                self._slots.append(slot)
                self._changed.notify_all()
                return True
        self._arena.give_back(slot)
        return False

    def end(self) -> None:
        """Say that this was all."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Say that there will be no more, and why."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Slot]:
        """Receive every slot. Raises `StagingStopped` from what ``fail`` was told, and after ``close``."""
        while (slot := self._next()) is not None:
            yield slot

    def _next(self) -> Slot | None:
        with self._changed:
            while not self._slots:
                if self._failure is not None:
                    raise StagingStopped(f"staging stopped: {self._failure!r}") from self._failure
                if self._is_ended:
                    return None
                if self._is_closed:
                    raise StagingStopped("nobody waits for what is staged any more")
                self._changed.wait()
            return self._slots.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Receive no more: what is left, and what is still sent, is given back."""
        with self._changed:
            self._is_closed = True
            left, self._slots = self._slots, deque()
        for slot in left:
            self._arena.give_back(slot)
