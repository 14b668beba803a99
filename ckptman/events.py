"""
Frozen records of what happened, and the hook that is called with each.

A hook runs on the thread on which the thing happened (a save's commit: the background thread), must be
quick, and cannot stop or fail a save: what it raises is logged and dropped. It may not call the manager that it
listens to; what must follow a commit (a tag, a copy) belongs into the training loop, after ``result()``.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ckptman.types import Checkpoint

_log = logging.getLogger("ckptman")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What every event has: the root (credentials redacted)."""

    root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BecameWriter(Event):
    """This process may write from now on. ``epoch`` counts the root's writers."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged(Event):
    """The state was copied; training may go on. ``stall_s`` is how long ``save`` kept it waiting."""

    step: int
    nbytes: int
    stall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Event):
    """A checkpoint exists and is durable. ``duration_s`` counts from the call of ``save``."""

    checkpoint: Checkpoint
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned(Event):
    """The keep rule dropped these steps in the same commit."""

    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveErred(Event):
    """A save failed; nothing of it exists."""

    step: int
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored(Event):
    """A checkpoint was loaded into the live objects."""

    checkpoint: Checkpoint
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged(Event):
    """A damaged checkpoint (``step``) or catalog record (``step`` is None) was passed over."""

    step: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirrored(Event):
    """
    A checkpoint exists at the mirror too, and is durable there. ``checkpoint`` is the mirror's.

    ``sent_nbytes`` are the files that were not there yet; ``duration_s`` counts from the beginning of the copying.
    """

    mirror: str
    checkpoint: Checkpoint
    sent_nbytes: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorErred(Event):
    """
    The mirror could not be read or written; training is not concerned.

    ``step`` is what was being copied, None where it did not get so far; ``retry_s`` is when it is tried again, None
    where it is not: a damaged checkpoint, a mirror that another writer took over, or a manager that closes.
    """

    mirror: str
    step: int | None
    error: BaseException
    retry_s: float | None


class Hook(Protocol):
    """Anything that can be called with an event."""

    def __call__(self, event: Event, /) -> object: ...


class Hooks:
    """
    All that want to hear of events. One that raises is logged, and stops nothing.

    Raises:
        TypeError: One of *hooks* cannot be called.
    """

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self._hooks = tuple(hooks)
        if not all(callable(hook) for hook in self._hooks):
            raise TypeError(f"hooks must be callable with an event, got {hooks!r}")

    def emit(self, event: Event) -> None:
        """Call all of them with *event*."""
        for hook in self._hooks:
            try:
                hook(event)
            except Exception:  # noqa: BLE001 - a hook cannot stop a save
                _log.exception("the hook %r failed on %s", hook, type(event).__name__)

    def emit_weakly(self) -> Callable[[Event], None]:
        """``emit`` for a thread: it does not keep the hooks alive, which may know the manager that should end it."""
        reached = weakref.WeakMethod(self.emit)

        def emit(event: Event) -> None:
            tell = reached()
            if tell is not None:
                tell(event)

        return emit
