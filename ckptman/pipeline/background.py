"""The thread that writes while training goes on: one save after the other, and no failure that nobody hears of."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ckptman.pipeline.overlap import Deferred
from ckptman.types import Checkpoint

_log = logging.getLogger("ckptman")


class PendingSave:
    """
    A save under way. Its failure is raised by ``result``, or, if nobody asks, by the next save or by ``close``.

    Attributes:
        step: The step that is being saved.
    """

    def __init__(self, step: int, future: Future[Checkpoint], stall_s: float, deferred: Deferred | None = None) -> None:
        self.step = step
        self._stall_s = stall_s
        self._future = future
        self._deferred = deferred
        self._is_collected = False

    def __repr__(self) -> str:
        return f"<PendingSave step={self.step} {'done' if self.done() else 'under way'}>"

    @property
    def stall_s(self) -> float:
        """Seconds that training was kept waiting: for an earlier save, for staging, and at the next step (overlap)."""
        return self._stall_s + (self._deferred.waited_s if self._deferred else 0.0)

    @stall_s.setter
    def stall_s(self, seconds: float) -> None:
        self._stall_s = seconds

    def done(self) -> bool:
        """Whether it is over, one way or the other. Never waits."""
        if self._deferred is not None:
            self._deferred.settle(wait=False)
        return self._future.done()

    def result(self, timeout: float | None = None) -> Checkpoint:
        """
        Wait until the checkpoint is durable and committed.

        Raises:
            TimeoutError: *timeout* seconds were not enough; the save goes on.
            SaveFailed, Fenced, CommitUnknown: As ``CheckpointManager.save``.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._future.result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait as ``result`` does; return the error instead of raising it, None if the save succeeded."""
        error = self._wait(timeout)
        self._is_collected = True
        return error

    def _wait(self, timeout: float | None) -> BaseException | None:
        if self._deferred is not None:
            self._deferred.settle()
        return self._future.exception(timeout)

    def _uncollected(self) -> BaseException | None:
        return None if self._is_collected else self.exception()


class Background:
    """
    Runs saves one after the other, on a thread that is made for the first one and joined by ``shutdown``.

    To be used by one thread. A forked child has no such thread: there, nothing is ever under way. At the exit of the
    interpreter a save that is under way is finished.

    Args:
        in_flight: How many may be under way, the one that is being written included.
    """

    def __init__(self, in_flight: int = 1) -> None:
        self._in_flight = in_flight
        self._executor: ThreadPoolExecutor | None = None
        self._pending: list[PendingSave] = []  # in their order, until somebody asked for failures
        self._pid = os.getpid()
        self._writing_thread: int | None = None  # written by that thread alone

    def start(
        self, save: Callable[[], Checkpoint], *, step: int, stall_s: float, deferred: Deferred | None = None
    ) -> PendingSave:
        """
        Begin *save*, after `admit`.

        If this is interrupted (Ctrl-C), *save* may be under way or not: what it reads must not be used again.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="ckptman-save")
        future: Future[Checkpoint] = Future()  # ours, not the executor's: that one we may never get to see
        pending = PendingSave(step, future, stall_s, deferred)
        self._pending.append(pending)
        try:
            self._executor.submit(self._fulfil, future, save, step)
        except BaseException:
            self._pending.remove(pending)
            raise
        return pending

    def _fulfil(self, future: Future[Checkpoint], save: Callable[[], Checkpoint], step: int) -> None:
        self._writing_thread = threading.get_ident()
        try:
            future.set_result(save())
        except BaseException as error:  # noqa: BLE001 - a thread's edge: whoever asks for the result gets it
            _log.error("saving step %d failed: %s", step, error)
            future.set_exception(error)
        finally:
            self._writing_thread = None

    def admit(self) -> None:
        """Wait until one more save may be under way. Raises RuntimeError as ``drain`` does."""
        self._wait_for(len(self._pending) - self._in_flight + 1, None)

    def drain(self, timeout: float | None = None) -> None:
        """
        Wait until nothing is under way.

        Raises:
            TimeoutError: *timeout* seconds were not enough.
            RuntimeError: A hook that runs on the writing thread called this: it would wait for itself.
        """
        self._wait_for(len(self._pending), timeout)

    def _wait_for(self, count: int, timeout: float | None) -> None:
        if self._writing_thread == threading.get_ident():
            raise RuntimeError("a hook may not call the manager whose save it is told of: it would wait for itself")
        if os.getpid() == self._pid:
            ends_at = None if timeout is None else time.monotonic() + timeout
            for pending in self._pending[: max(0, count)]:
                pending._wait(None if ends_at is None else max(0.0, ends_at - time.monotonic()))

    def uncollected(self) -> BaseException | None:
        """The first failure that nobody has seen among the saves that are over; it counts as seen from now on."""
        if os.getpid() != self._pid:
            return None
        for pending in [pending for pending in self._pending if pending._future.done()]:
            self._pending.remove(pending)
            if (failure := pending._uncollected()) is not None:
                return failure
        return None

    def shutdown(self) -> None:
        """Join the thread. To be drained before."""
        if self._executor is not None:
            self._executor.shutdown()
