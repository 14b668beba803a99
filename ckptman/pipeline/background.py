"""The thread that writes while training goes on: one save at a time, and no failure that nobody hears of."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ckptman.types import Checkpoint

_log = logging.getLogger("ckptman")


class PendingSave:
    """
    A save under way. Its failure is raised by ``result``, or, if nobody asks, by the next save or by ``close``.

    Attributes:
        step: The step that is being saved.
        stall_s: How many seconds ``save`` kept training waiting (for an earlier save, and for staging).
    """

    def __init__(self, step: int, future: Future[Checkpoint], stall_s: float) -> None:
        self.step = step
        self.stall_s = stall_s
        self._future = future
        self._is_collected = False

    def __repr__(self) -> str:
        return f"<PendingSave step={self.step} {'done' if self.done() else 'under way'}>"

    def done(self) -> bool:
        """Whether it is over, one way or the other. Never waits."""
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
        error = self._future.exception(timeout)
        self._is_collected = True
        return error

    def _wait(self, timeout: float | None) -> None:
        self._future.exception(timeout)

    def _uncollected(self) -> BaseException | None:
        return None if self._is_collected else self.exception()


class Background:
    """
    Runs one save at a time, on a thread that is made for the first one and joined by ``shutdown``.

    To be used by one thread. A forked child has no such thread: there, nothing is ever under way. At the exit of the
    interpreter a save that is under way is finished.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._last: PendingSave | None = None
        self._pid = os.getpid()
        self._writing_thread: int | None = None  # written by that thread alone

    def start(self, save: Callable[[], Checkpoint], *, step: int, stall_s: float) -> PendingSave:
        """
        Begin *save*, after `drain`.

        If this is interrupted (Ctrl-C), *save* may be under way or not: what it reads must not be used again.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="ckptman-save")
        future: Future[Checkpoint] = Future()  # ours, not the executor's: that one we may never get to see
        try:
            self._last = PendingSave(step, future, stall_s)
            self._executor.submit(self._fulfil, future, save, step)
        except BaseException:
            self._last = None
            raise
        return self._last

    def _fulfil(self, future: Future[Checkpoint], save: Callable[[], Checkpoint], step: int) -> None:
        self._writing_thread = threading.get_ident()
        try:
            future.set_result(save())
        except BaseException as error:  # noqa: BLE001 - a thread's edge: whoever asks for the result gets it
            _log.error("saving step %d failed: %s", step, error)
            future.set_exception(error)
        finally:
            self._writing_thread = None

    def drain(self, timeout: float | None = None) -> None:
        """
        Wait until nothing is under way.

        Raises:
            TimeoutError: *timeout* seconds were not enough.
            RuntimeError: A hook that runs on the writing thread called this: it would wait for itself.
        """
        if self._writing_thread == threading.get_ident():
            raise RuntimeError("a hook may not call the manager whose save it is told of: it would wait for itself")
        if self._last is not None and os.getpid() == self._pid:
            self._last._wait(timeout)

    def uncollected(self) -> BaseException | None:
        """The failure of the last save if nobody has seen it; it counts as seen from now on. To be drained before."""
        last, self._last = self._last, None
        return last._uncollected() if last is not None and os.getpid() == self._pid else None

    def shutdown(self) -> None:
        """Join the thread. To be drained before."""
        if self._executor is not None:
            self._executor.shutdown()
