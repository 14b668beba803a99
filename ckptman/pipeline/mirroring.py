"""
The mirror: a second root that gets a copy of every checkpoint, by a thread of its own.

It may lag behind and it may fail; training never waits for it and never fails with it. Copying is that of
`ckptman.pipeline.copying`: checked on the way, a commit for each checkpoint, files that were sent are not sent again.

1. The thread begins when this process becomes the writer of the root, and wakes with every commit.
2. It copies the newest checkpoint that the mirror lacks and would keep, looks again, and so works its way back: after
   an outage the newest is safe first, then the older ones.
3. One that the root drops while it is copied is left, and so is one that is damaged.
4. What fails is told (`MirrorErred`) and tried again after a pause, which doubles up to a minute. Another writer that
   takes the mirror over ends it: two would drop each other's checkpoints.
5. ``close`` lets it copy the newest checkpoint, within bounds: see `Mirror`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass

from ckptman.errors import CommitUnknown, Fenced, IntegrityError, LockError, redact
from ckptman.events import Event, Mirrored, MirrorErred
from ckptman.format.catalog import Entry
from ckptman.pipeline.copying import Copying, begin
from ckptman.repository import keep as keep_rules
from ckptman.repository.counterparts import due
from ckptman.repository.head import read_head
from ckptman.repository.keep import Keep
from ckptman.repository.lease import LIFE_S
from ckptman.repository.repository import checkpoint_of
from ckptman.storage.base import Storage
from ckptman.storage.opening import open_storage

_log = logging.getLogger("ckptman")

LOCK_TIMEOUT_S = 1.5 * LIFE_S
"""For another writer of the mirror, before it counts as a failure: long enough to see that a lease is a dead one's."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Between tries."""

STOP_TIMEOUT_S = 10.0
"""For a request under way, once the thread was told to stop at the next piece."""


@dataclass(frozen=True, slots=True, repr=False)
class Mirror:
    """
    A second root for the checkpoints of a manager.

    Args:
        root: Where it is: whatever a root of a manager may be.
        keep: What to retain there. The default deletes nothing there, whatever the first root drops.
        close_timeout: Seconds that closing the manager waits for the newest checkpoint to arrive. It waits no longer
            once a try has failed, and not at all after a preemption notice.
        storage_options: As those of the manager, for this root.

    Raises:
        TypeError, ValueError: An argument is wrong.
    """

    root: str | os.PathLike[str] | Storage
    _: KW_ONLY
    keep: Keep = keep_rules.everything
    close_timeout: float = 600.0
    storage_options: Mapping[str, object] | None = None

    def __repr__(self) -> str:
        """Without what may be secret: the options, and the password of a URL."""
        root = self.root.url if isinstance(self.root, Storage) else redact(str(self.root))
        return f"Mirror({root!r}, keep={self.keep!r}, close_timeout={self.close_timeout!r})"

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Keep):
            raise TypeError(f"keep must be a rule such as keep.last(3), got {self.keep!r}")
        if not self.close_timeout >= 0:
            raise ValueError(f"close_timeout must be 0 or more seconds, got {self.close_timeout!r}")


class _Stopped(Exception):
    """The thread was told to stop while it was copying."""


class Mirroring:
    """
    Copies what *source* has to *mirror*. Does nothing before `notify`; a forked child has none of it.

    *emit* is told what happens, on the thread; *pause_s* is the first pause after a failure.

    Attributes:
        storage: The mirror's.
    """

    def __init__(
        self,
        source: Storage,
        mirror: Mirror,
        emit: Callable[[Event], object],
        *,
        pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self.storage = open_storage(mirror.root, storage_options=mirror.storage_options)
        if self.storage.identity == source.identity:
            raise ValueError(f"{source.url} cannot be the mirror of itself")
        self._source = source
        self._mirror = mirror
        self._emit = emit
        self._pause_s = pause_s
        self._pid = os.getpid()
        self._state = threading.Condition()  # guards the four below
        self._thread: threading.Thread | None = None
        self._has_work = False
        self._is_closing = False
        self._is_stopped = False
        self._copying: Copying | None = None  # this and the rest belong to the thread alone
        self._is_tidy = False
        self._passed: set[tuple[str, tuple[str, ...]]] = set()  # attempts, with their tags, that are done or damaged
        self._step: int | None = None  # under way

    def notify(self) -> None:
        """There is something new. To be called by the writer of the source."""
        with self._state:
            self._has_work = True
            self._state.notify_all()
            if self._thread is None and not self._is_closing:
                thread = threading.Thread(target=self._run, name="ckptman-mirror", daemon=True)
                with suppress(RuntimeError):  # the interpreter is about to end
                    thread.start()
                    self._thread = thread

    def close(self, *, waits: bool) -> None:
        """Let the newest checkpoint arrive, if *waits*, within the mirror's bounds; then end the thread and join it."""
        thread = self._thread
        with self._state:
            self._is_closing = True
            self._state.notify_all()
        if thread is None or os.getpid() != self._pid:
            return
        if waits:
            thread.join(self._mirror.close_timeout)
        if thread.is_alive():
            if waits:
                _log.warning("the mirror %s has not got the newest checkpoint in time", self.storage.url)
            self.stop()
            thread.join(STOP_TIMEOUT_S)

    def refuse_its_thread(self) -> None:
        """Raise RuntimeError on the thread: a hook that closes the manager there would wait for itself."""
        if self._thread is threading.current_thread():
            raise RuntimeError("a hook may not close the manager whose mirror it is told of: it would wait for itself")

    def stop(self) -> None:
        """Have the thread end at the next piece that it reads or writes. Waits for nothing."""
        with self._state:
            self._is_stopped = self._is_closing = True
            self._state.notify_all()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while self._wait_for_work() and self._try_until_done():
                pass
        finally:
            self._drop_copying()

    def _wait_for_work(self) -> bool:
        with self._state:
            self._state.wait_for(lambda: self._has_work or self._is_closing)
            has_work, self._has_work = self._has_work, False
            return (has_work or not self._is_closing) and not self._is_stopped

    def _try_until_done(self) -> bool:
        """Catch up, whatever it takes; False where this process is to do no more."""
        pause_s = self._pause_s
        while True:
            try:
                self._catch_up()
            except _Stopped:
                return False
            except Exception as error:  # noqa: BLE001 - a thread's edge: training goes on whatever this was
                is_over = isinstance(error, Fenced) or self._is_closing
                self._tell(error, retry_s=None if is_over else pause_s)
                if isinstance(error, (LockError, CommitUnknown)):
                    self._drop_copying()  # the next try reads anew what the mirror has
                if is_over or not self._sleep(pause_s):
                    return False
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                return True  # there may be more work since we looked, also where the manager closes by now

    def _sleep(self, pause_s: float) -> bool:
        """Whether to go on: a manager that closes meanwhile gets one more try."""
        with self._state:
            self._state.wait_for(lambda: self._is_closing or self._is_stopped, pause_s)
            return not self._is_stopped

    def _catch_up(self) -> None:
        while (found := self._next()) is not None:
            self._copy(*found)
        if self._copying is not None and not self._is_tidy:
            self._is_tidy = True  # once: later leftovers are of this very session
            self._copying.tidy()

    def _next(self) -> tuple[Entry, tuple[Entry, ...]] | None:
        """What to copy next, and all that the source has; None if the mirror has what it should."""
        self._check_stopped()
        self._step = None
        entries = _entries(self._source)
        there = self._copying.entries if self._copying is not None else _entries(self.storage)
        wanted = due(entries, there, self._mirror.keep, self.storage.url)
        wanted = [entry for entry in wanted if (entry.attempt, entry.tags) not in self._passed]
        if self._is_closing:
            wanted = [entry for entry in wanted if entry is entries[-1]]
        return (wanted[0], entries) if wanted else None

    def _copy(self, entry: Entry, entries: tuple[Entry, ...]) -> None:
        began, self._step = time.monotonic(), entry.step
        if self._copying is None:
            self._copying = begin(self._source, self.storage, timeout_s=LOCK_TIMEOUT_S, on_succession=self._give_way)
        try:
            copied = self._copying.copy(
                entry, entries, keep=self._mirror.keep, replace=True, progress=lambda nbytes: self._check_stopped()
            )
        except IntegrityError as error:
            if entry.attempt in {one.attempt for one in _entries(self._source)}:
                self._passed.add((entry.attempt, entry.tags))
                self._tell(error, retry_s=None)
            return
        # Also where it is there: a keep rule that drops what it wanted before must not bring us here for ever.
        self._passed.add((entry.attempt, entry.tags))
        if copied.is_new:
            duration_s = time.monotonic() - began
            _log.info("mirrored step %d to %s in %.2f s", entry.step, self.storage.url, duration_s)
            self._emit(
                Mirrored(
                    root=self._source.url,
                    mirror=self.storage.url,
                    checkpoint=checkpoint_of(copied.entry, self.storage.url),
                    sent_nbytes=copied.sent_nbytes,
                    duration_s=duration_s,
                )
            )

    def _check_stopped(self) -> None:
        if self._is_stopped:
            raise _Stopped

    def _tell(self, error: Exception, *, retry_s: float | None) -> None:
        after = f"next try in {retry_s:g} s" if retry_s is not None else "the next run catches up"
        _log.warning("mirroring %s to %s failed (%s): %s", self._source.url, self.storage.url, after, error)
        event = MirrorErred(
            root=self._source.url, mirror=self.storage.url, step=self._step, error=error, retry_s=retry_s
        )
        self._emit(event)

    def _give_way(self) -> None:
        """Another writer in this process takes the mirror over."""
        self.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(STOP_TIMEOUT_S)

    def _drop_copying(self) -> None:
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.release()


def _entries(storage: Storage) -> tuple[Entry, ...]:
    """What exists there. No warnings: those are for the thread that trains."""
    record = read_head(storage).record
    return record.checkpoints if record is not None else ()
