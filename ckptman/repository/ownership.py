"""
Becoming the writer of a root, and ceasing to be it.

1. Put ``ckptman.json`` (create-only; whoever comes second reads the first one's).
2. Wait for the lock: a file lock, or on object stores a lease; none where the storage can have neither.
3. Commit a record with the next epoch. From then on no older writer can commit, whether or not the lock excluded it.
4. Sweep what dead writers left behind.

Within one process a second owner does not wait: it drains the first one, takes its lock over, and the first is fenced.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Callable
from datetime import datetime

import msgspec

from ckptman.errors import Fenced, FormatError, LockTimeout
from ckptman.format.catalog import Record, Writer
from ckptman.format.names import FORMAT, MARKER, Attempt
from ckptman.format.sealed import NewerFormat
from ckptman.repository.commit import Change, commit, utc_now
from ckptman.repository.file_lock import RootLock
from ckptman.repository.head import Head, attempts, has_manifest, read_head
from ckptman.repository.lease import LIFE_S, Holder, Lease
from ckptman.repository.sweep import clear_up, no_longer_needed, tidy
from ckptman.storage.base import KeyExists, KeyMissing, Storage, Swaps

Lock = RootLock | Lease

MAX_MARKER_NBYTES = 1 << 16

TAKE_OVER = "take over"
"""The change of a record that only names a new writer."""


class _Marker(msgspec.Struct, kw_only=True):
    format: int
    id: str


class Ownership:
    """
    The right to change a root, as far as anybody knows. Made by `take`, ended by ``release`` or by a successor.

    Every commit proves it anew, so holding one promises nothing. Safe to use from several threads. A forked child
    does not inherit it.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        root: str,
        record: Record,
        lock: Lock | None,
        on_succession: Callable[[], object],
    ) -> None:
        self.storage = storage
        self.root = root
        self.writer = record.writer
        self.newest = record
        self._lock = lock
        self._on_succession = on_succession
        self._lost_to: str | None = None
        self._mutex = threading.Lock()  # guards newest and the order of our own commits

    def commit(self, change: Change, what: str) -> Record:
        """
        Commit *change* as this writer, then delete the files that only it kept from being garbage.

        Raises:
            Fenced: Another writer took over.
            CommitUnknown, StorageError: As `repository.commit.commit` says.
        """
        self.check()
        with self._mutex:
            before = self.newest
            try:
                record = commit(
                    self.storage, change, root=self.root, what=what, writer_for=self._still_ours, known=before
                )
            except Fenced as error:
                self._lost_to = str(error)
                raise
            self.newest = record
            dropped = no_longer_needed(before.checkpoints, record.checkpoints)
            tidy(self.storage, record, dropped, swept=before)
        return record

    def discard(self, attempt: str) -> None:
        """Delete what an attempt of ours, of which we know that it failed, left behind."""
        tidy(self.storage, self.newest, [attempt])

    def check(self) -> None:
        """Raise `Fenced` if we know that we are not the writer any more, or are a forked child of it."""
        if self._lost_to is not None:
            raise Fenced(self._lost_to)
        if os.getpid() != self.writer.pid:
            raise Fenced(
                f"process {os.getpid()} was forked from the writer of {self.storage.url} (process {self.writer.pid}): "
                "save from that one, or open a manager of its own root here"
            )

    def release(self) -> None:
        """Let another process become the writer. Calling it again does nothing."""
        if os.getpid() != self.writer.pid:
            return
        with _OWNERS_MUTEX:
            if _OWNERS.get(self.storage.identity) is self:
                del _OWNERS[self.storage.identity]
        lock, self._lock = self._lock, None
        self._lost_to = self._lost_to or f"this writer of {self.storage.url} was closed"
        if lock is not None:
            lock.release()

    def surrender(self) -> Lock | None:
        """Finish what is under way, then hand the lock to a successor in this process."""
        self._on_succession()
        self._lost_to = f"another manager in this process took {self.storage.url} over"
        lock, self._lock = self._lock, None
        return lock

    def _still_ours(self, head: Head) -> Writer:
        found = head.record.writer if head.record else None
        if found is None or found.id != self.writer.id:
            by = f"by {found.host}, pid {found.pid}, epoch {found.epoch}" if found else "and its records are gone"
            raise Fenced(
                f"{self.storage.url} was taken over {by}; this writer (epoch {self.writer.epoch}, pid "
                f"{self.writer.pid}) committed nothing"
            )
        return self.writer


_OWNERS: dict[str, Ownership] = {}  # by the storage's identity
_OWNERS_MUTEX = threading.Lock()


def _forget_owners() -> None:
    global _OWNERS_MUTEX  # noqa: PLW0603 - the parent may have held it while it forked
    _OWNERS_MUTEX = threading.Lock()
    _OWNERS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_owners)


def take(
    storage: Storage,
    *,
    timeout_s: float,
    change: Change = tuple,
    what: str = TAKE_OVER,
    sweeps: bool = True,
    mend: Callable[[Storage], str] | None = None,
    on_succession: Callable[[], object] = lambda: None,
    clock: Callable[[], datetime] = utc_now,
) -> Ownership:
    """
    Become the writer of the root, and apply *change* in the same commit.

    Args:
        storage: The root. It is created if it does not exist.
        timeout_s: Seconds to wait for a writer in another process to go away.
        change: Applied to what exists.
        what: The phrase for the catalog.
        sweeps: Whether to delete what dead writers left behind.
        mend: For a repair: called under the lock, it mends the root's marker and returns the root's id; and a root
            whose records are all damaged or gone is accepted though it holds checkpoints.
        on_succession: Called when another owner in this process takes over; returns when nothing is under way.
        clock: Tells the time.

    Raises:
        LockTimeout: Another process is the writer and stays it.
        FormatError: The root is of a newer format, or has checkpoints but no readable record (see `repair`).
        StorageError: The medium failed.
    """
    identify = mend or _known(_marker(storage))
    lock = _lock(storage, timeout_s)
    identity, since = secrets.token_hex(8), clock()

    def next_writer(head: Head) -> Writer:
        if head.record is None and mend is None:
            refuse_unlisted(storage)
        return _writer(storage, head, identity, since)

    try:
        root = identify(storage)
        record = commit(storage, change, root=root, what=what, writer_for=next_writer, clock=clock)
        if sweeps:
            clear_up(storage, record)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    owner = Ownership(storage, root=root, record=record, lock=lock, on_succession=on_succession)
    with _OWNERS_MUTEX:
        _OWNERS[storage.identity] = owner
    return owner


def depose(storage: Storage, *, after: int, what: str) -> None:
    """
    End the reign of whoever wrote record *after* and is known to be dead, by a record of our own; own nothing then.

    For a root with a lease, which would keep everybody waiting for `LIFE_S` after its holder's death. If the holder
    lives after all, it is fenced.

    Raises:
        Fenced: There is a newer record: somebody was faster.
        CommitUnknown, StorageError: As `repository.commit.commit` says.
    """
    identity, since = secrets.token_hex(8), utc_now()

    def successor(head: Head) -> Writer:
        if head.number != after:
            raise Fenced(f"{what}: record {head.number} of {storage.url} is there already")
        return _writer(storage, head, identity, since)

    commit(storage, tuple, root=_marker(storage), what=what, writer_for=successor)


def _known(root: str) -> Callable[[Storage], str]:
    return lambda storage: root


def _writer(storage: Storage, head: Head, identity: str, since: datetime) -> Writer:
    """This process as the one that comes after all writers so far."""
    epoch = 1 + _highest_epoch(storage, head)
    return Writer(epoch=epoch, id=identity, host=socket.gethostname(), pid=os.getpid(), since=since)


def _highest_epoch(storage: Storage, head: Head) -> int:
    """Of all writers so far, those included whose record is damaged but who named attempts."""
    epochs = [attempt.epoch for name in attempts(storage) if (attempt := Attempt.parse(name))]
    return max([0, *epochs, *([head.record.writer.epoch] if head.record else [])])


def is_owned(storage: Storage) -> bool:
    """Whether somebody in this process is the writer."""
    with _OWNERS_MUTEX:
        return storage.identity in _OWNERS


def _lock(storage: Storage, timeout_s: float) -> Lock | None:
    with _OWNERS_MUTEX:
        predecessor = _OWNERS.get(storage.identity)
    if predecessor is not None:
        lock = predecessor.surrender()  # if this is interrupted, the predecessor is still the owner
        with _OWNERS_MUTEX:
            _OWNERS.pop(storage.identity, None)
        return lock
    if storage.lock_path is not None:
        lock = RootLock(storage.lock_path)
        if not lock.acquire(timeout_s):
            raise _held(storage, timeout_s, None)
        return lock
    if isinstance(storage, Swaps) and storage.can_swap:
        lease = Lease(storage)
        if not lease.acquire(timeout_s):
            raise _held(storage, timeout_s, lease.holder)
        return lease
    return None


def _held(storage: Storage, timeout_s: float, holder: Holder | None) -> LockTimeout:
    record = read_head(storage).record
    writer = holder or (record.writer if record else None)
    if writer is None:
        return LockTimeout(
            f"another process holds the lock of {storage.url} and did not free it within {timeout_s:g} s"
        )
    age = (utc_now() - writer.since).total_seconds()
    return LockTimeout(
        f"{storage.url} has a writer that did not go away within {timeout_s:g} s: host {writer.host}, "
        f"pid {writer.pid}, for {age:.0f} s (since {writer.since:%Y-%m-%d %H:%M:%S} UTC). "
        "Wait for it, stop it, or use another root"
        + (f" (one that was killed is succeeded {LIFE_S:g} s after its last sign of life)" if holder else ""),
        host=writer.host,
        pid=writer.pid,
    )


def refuse_unlisted(storage: Storage) -> None:
    """Raise `FormatError` if a root without a readable record holds checkpoints: it is damaged, not new."""
    if any(has_manifest(storage, attempt) for attempt in attempts(storage)):
        raise FormatError(
            f"{storage.url} holds checkpoints, but no readable catalog record: run 'ckptman repair {storage.url}'"
        )


def _marker(storage: Storage) -> str:
    """The id of the root, which is made if there is none yet."""
    try:
        return read_marker(storage.read(MARKER, limit=MAX_MARKER_NBYTES), storage.url)
    except KeyMissing:
        pass
    try:
        return write_marker(storage, None)
    except KeyExists:
        return read_marker(storage.read(MARKER, limit=MAX_MARKER_NBYTES), storage.url)


def write_marker(storage: Storage, identity: str | None) -> str:
    """Put ``ckptman.json`` with *identity* (None: a fresh one), create-only; return the id."""
    marker = _Marker(format=FORMAT, id=identity or secrets.token_hex(16))
    storage.create(MARKER, msgspec.json.encode(marker))
    return marker.id


def read_marker(data: bytes, url: str) -> str:
    """
    The id in ``ckptman.json``.

    Raises:
        FormatError: It is damaged, or of a newer format.
    """
    try:
        marker = msgspec.json.decode(data, type=_Marker)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{url}/{MARKER} is damaged ({error}): run 'ckptman repair {url}'") from error
    if marker.format > FORMAT:
        raise NewerFormat(
            f"{url} has format {marker.format}, this ckptman reads up to {FORMAT}: install a newer ckptman"
        )
    return marker.id
