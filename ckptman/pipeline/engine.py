"""What all saves of a manager share: staging memory, plans, what may be borrowed, hooks, and the threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from torch.optim import Optimizer

from ckptman.errors import SaveFailed
from ckptman.pipeline import devices
from ckptman.pipeline.arena import Arena, Slot, pages, pinned
from ckptman.pipeline.background import Background, PendingSave
from ckptman.pipeline.borrowing import Borrowed, Borrowing
from ckptman.pipeline.budget import Limits
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.pipeline.overlap import Deferred, Overlap, addresses
from ckptman.pipeline.planning import PlannedFile, Planner
from ckptman.pipeline.staging import Staging
from ckptman.pipeline.stream import Stream
from ckptman.pipeline.writing import ALONE_NBYTES
from ckptman.state.capture import Captured
from ckptman.state.sizes import expected_nbytes
from ckptman.types import Checkpoint

_log = logging.getLogger("ckptman")

_STREAMS_NBYTES = 1 << 14
"""What the random streams take at most, without accelerators."""

BLOCKING_SLOTS = 3
"""What a save takes that training waits for: one slot is written, one is filled, and one lies ready between them."""


@dataclass(frozen=True, slots=True)
class Source:
    """What the writer gets of one save: the files, their bytes as they are staged, and what lies elsewhere already."""

    files: list[PlannedFile]
    borrowed: Borrowed
    slots: Iterator[Slot]  # in the order of the files' segments; each is given back to the arena
    arena: Arena
    confirm: Callable[[], None]  # to be called before the commit; raises where the staged bytes must not be used


Attempts = Callable[[], Collection[str]]
"""Gives the attempts that the catalog lists."""

Write = Callable[[Source], Checkpoint]
"""Writes and commits one save."""


class Engine:
    """
    Stages saves and runs them. To be used by the thread that trains.

    Args:
        state: Component name → live object; None for a manager that never saves.
        limits: What may be taken of the machine.
        overlap: Whether staging may go on after ``save`` has returned.
        ranks: How many share the work of a save.

    Raises:
        ValueError: Several saves are to be under way from several ranks.
    """

    def __init__(self, state: Mapping[str, object] | None, limits: Limits, *, overlap: bool, ranks: int = 1) -> None:
        if ranks > 1 and limits.in_flight > 1:
            raise ValueError(
                f"with {ranks} ranks one save is under way at a time: in_flight={limits.in_flight} cannot be "
                "had. Leave it out of Limits(…)"
            )
        self._state = state or {}
        self._ranks = ranks
        self._limits = limits
        self._arena = self._new_arena()
        self._planner = Planner()
        self.borrowing = Borrowing()
        self.overlap = Overlap() if overlap else None
        self.background = Background(limits.in_flight)  # knows nothing of the state: see Ownership
        self._stager: ThreadPoolExecutor | None = None
        self._has_saved = False
        self._has_said_that_it_does_not_fit = False

    def prefault(self) -> None:
        """Take the staging memory that the state will need, in the background."""
        if self._state and self._limits.prefault:
            self._arena.prefault([*expected_nbytes(self._state, ranks=self._ranks), _STREAMS_NBYTES])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave memory and disk to a restore; then take what the restored state will need."""
        self._arena.stop()
        yield
        if not self._has_saved:
            self.prefault()

    def admit(self, *, block: bool) -> None:
        """Wait until a save may begin: until few enough are under way, or none for one that blocks."""
        self.settle()
        if block:
            self.background.drain()
        else:
            self.background.admit()

    def save_now(self, write: Write, captured: Mapping[str, Captured], attempts: Attempts) -> Checkpoint:
        """Stage and write at the same time, through a few slots; return what *write* returns."""
        self._arena.stop()
        if not self._has_saved:
            self._arena.trim(BLOCKING_SLOTS)  # perhaps all saves of this program block: see Limits.prefault
        self._has_saved = True
        attempts()  # here training waits for the disk anyway
        borrowed = self._borrow(captured, attempts, self._trained())
        staging = self._staging(captured, borrowed, slots=BLOCKING_SLOTS)
        with self._renewing_the_arena_on_failure(), Stream(self._arena) as stream:
            if staging.nbytes <= ALONE_NBYTES:
                return write(Source(staging.files, borrowed, staging.copied(), self._arena, _nothing))
            try:
                beside = ThreadPoolExecutor(1, thread_name_prefix="ckptman-stage")
                copying = beside.submit(staging.run, stream)
            except RuntimeError:  # the interpreter is about to end, and starts no thread any more
                return write(Source(staging.files, borrowed, staging.copied(), self._arena, _nothing))
            try:
                return write(Source(staging.files, borrowed, iter(stream), self._arena, _nothing))
            finally:
                stream.close()
                copying.exception()
                beside.shutdown()

    def save_behind(
        self,
        write: Write,
        captured: Mapping[str, Captured],
        attempts: Attempts,
        *,
        step: int,
        began: float,
        on_staged: Callable[[int, float], None],
    ) -> PendingSave:
        """
        Stage, and write in the background.

        Args:
            write: Called on the writing thread.
            captured: The state.
            attempts: Asked for those that the catalog lists once all is staged, or before where there is something to
                borrow from: it waits for the right to change the root, and raises.
            step: Of the save.
            began: When ``save`` was called, on the monotonic clock.
            on_staged: Called with the bytes to be written and the stall in seconds, before this returns.
        """
        self._has_saved = True
        self._arena.stop()
        with self._renewing_the_arena_on_failure():
            trained = self._trained()
            borrowed = self._borrow(captured, attempts, trained)
            staging = self._staging(captured, borrowed)
            stream = Stream(self._arena)
            fits = staging.reserve()
            deferred = self._stage(staging, stream, captured, step, trained) if fits else None
            attempts()
            stall_s = time.monotonic() - began
            confirm = deferred.confirm if deferred else _nothing
            source = Source(staging.files, borrowed, iter(stream), self._arena, confirm)
            if fits:
                on_staged(staging.nbytes, stall_s)
            pending = self.background.start(
                lambda: _closing(stream, write, source), step=step, stall_s=stall_s, deferred=deferred
            )
            if not fits:
                self._say_that_it_does_not_fit(staging)
                _run_ring(staging, stream, pending)
                pending.stall_s = time.monotonic() - began
                on_staged(staging.nbytes, pending.stall_s)
        return pending

    def settle(self) -> None:
        """Wait until nothing of the live state is needed any more."""
        if self.overlap is not None:
            self.overlap.settle()

    def close(self) -> None:
        """Remove the hooks and join the threads; to be drained before."""
        self.forget()
        if self._stager is not None:
            self._stager.shutdown()
        self.background.shutdown()

    def forget(self) -> None:
        """Take no more memory, and remove the hooks."""
        self._arena.stop()
        if self.overlap is not None:
            self.overlap.close()

    @contextmanager
    def _renewing_the_arena_on_failure(self) -> Iterator[None]:
        """Whatever stops staging, Ctrl-C above all: slots may be lost on the way, so all are given up."""
        try:
            yield
        except BaseException as error:
            self._arena = self._new_arena()
            if isinstance(error, MemoryError):
                raise SaveFailed(f"staging failed, nothing was committed: {error}") from error
            raise

    def _new_arena(self) -> Arena:
        if devices.are_in_use():
            return Arena(self._limits.host_nbytes, allocate=pinned, at_once=1)
        return Arena(self._limits.host_nbytes, allocate=pages)

    @no_search_for_cycles()
    def _staging(self, captured: Mapping[str, Captured], borrowed: Borrowed, *, slots: int | None = None) -> Staging:
        return Staging(self._arena, self._planner, captured, without=borrowed.keys, slots=slots)

    def _trained(self) -> set[int]:
        return addresses(live for live in self._state.values() if isinstance(live, Optimizer))

    @no_search_for_cycles()
    def _borrow(self, captured: Mapping[str, Captured], attempts: Attempts, trained: Collection[int]) -> Borrowed:
        if not self.borrowing.has_lender:
            return Borrowed()
        return self.borrowing.find(captured, trained=trained, attempts=attempts())

    def _stage(
        self, staging: Staging, stream: Stream, captured: Mapping[str, Captured], step: int, trained: Collection[int]
    ) -> Deferred | None:
        """Copy everything, or leave a part of it to a thread."""
        left = None if self.overlap is None else self.overlap.leave(captured, self._state, trained)
        if self.overlap is None or not left:
            staging.run(stream)
            return None
        deferred = Deferred(step, staging, staging.run_partly(left.has_not), stream, left)
        if self._stager is None:
            self._stager = ThreadPoolExecutor(1, thread_name_prefix="ckptman-stage")
        try:
            self._stager.submit(deferred.run)
        except RuntimeError:  # the interpreter is about to end, and starts no thread any more
            deferred.run()
        self.overlap.add(deferred)
        return deferred

    def _say_that_it_does_not_fit(self, staging: Staging) -> None:
        if not self._has_said_that_it_does_not_fit:
            self._has_said_that_it_does_not_fit = True
            _log.warning(
                "a state of %d MiB does not fit into %d MiB of staging memory (Limits.host_nbytes): it goes through a "
                "ring, so save() waits for the disk%s",
                staging.nbytes >> 20,
                self._arena.capacity() * 16,
                ", and overlap has no effect" if self.overlap else "",
            )


def _nothing() -> None:
    pass


def _closing(stream: Stream, write: Write, source: Source) -> Checkpoint:
    with stream:
        return write(source)


def _run_ring(staging: Staging, stream: Stream, pending: PendingSave) -> None:
    try:
        staging.run(stream)
    except BaseException:
        pending.exception()  # the writer fails with it, and it is raised here
        raise
