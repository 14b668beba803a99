"""
A process's wish to be the writer of a root, which may be fulfilled while it does something else.

A first save stages its tensors meanwhile. Nothing is written before the root is taken: whoever saves asks for the owner
first, and hears there what went wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from ckptman.repository.ownership import Ownership, is_owned, take
from ckptman.storage.base import Storage


class Claim:
    """
    A process's wish to be the writer of a root: nothing is taken until ``begin`` or ``owner`` is first called.

    To be used by one thread.

    Args:
        storage: The root.
        timeout_s: Seconds to wait for a writer in another process to go away.
        on_succession: As for `take`.
        on_taken: Called once this process is the writer.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        timeout_s: float,
        on_succession: Callable[[], object],
        on_taken: Callable[[Ownership], object],
    ) -> None:
        self.storage = storage
        self.held: Ownership | None = None
        self._timeout_s = timeout_s
        self._on_succession = on_succession
        self._on_taken = on_taken
        self._taking: _Taking | None = None

    def begin(self) -> None:
        """
        Begin to become the writer, on a thread: a lock and several fsyncs, beside which a first save can be staged.

        Whatever it meets is raised by ``owner``. Where this process has another writer of the root, whose saves must
        be finished first, nothing is begun: that is for the thread that trains.

        Raises:
            Fenced: This process was the writer.
        """
        if self.held is not None:
            self.held.check()
        elif self._taking is None and not is_owned(self.storage):
            taking = _Taking(self._take)
            with suppress(RuntimeError):  # the interpreter is about to end, and starts no thread any more
                taking.start()
                self._taking = taking

    def owner(self) -> Ownership:
        """Become the writer, unless this process is it already. Raises as `take` does, and Fenced."""
        if self.held is None:
            taking = self._taking
            if taking is None:
                self.held = self._take()
            else:
                taking.join()  # Ctrl-C may end this; the next call waits on
                self._taking = None
                self.held = taking.outcome()
            self._on_taken(self.held)
        self.held.check()
        return self.held

    def release(self) -> None:
        """Let go of what was taken; of what is just being taken too, once it is, without waiting for it."""
        if self._taking is not None:
            self._taking.give_up()
        if self.held is not None:
            self.held.release()

    def _take(self) -> Ownership:
        return take(self.storage, timeout_s=self._timeout_s, on_succession=self._on_succession)


class _Taking(threading.Thread):
    """Takes a root; a daemon, for it may wait for another writer as long as the user allows."""

    def __init__(self, take: Callable[[], Ownership]) -> None:
        super().__init__(name="ckptman-claim", daemon=True)
        self._take = take
        self._mutex = threading.Lock()  # guards the owner and whether it is given up
        self._owner: Ownership | None = None
        self._failure: BaseException | None = None
        self._is_given_up = False

    def run(self) -> None:
        try:
            owner = self._take()
        except BaseException as error:  # noqa: BLE001 - a thread's edge: `outcome` raises it
            self._failure = error
            return
        with self._mutex:
            self._owner = owner
            if self._is_given_up:
                owner.release()

    def outcome(self) -> Ownership:
        """For whoever has joined it: what was taken. Raises what stopped it."""
        if self._owner is None:
            raise self._failure or RuntimeError("the thread that takes the root ended without a word")
        return self._owner

    def give_up(self) -> None:
        """Nobody wants it any more."""
        with self._mutex:
            self._is_given_up = True
            if self._owner is not None:
                self._owner.release()
