"""
The commit protocol, whole: how what exists in a root changes.

A change becomes real by one create-only put of the next catalog record. What that rules out, as sequences:

*Two writers.* A and B both read record 41. B, the newer owner, puts 42. A's put of 42 fails (the key exists), A
reads on, finds B's epoch in the newest record and raises `Fenced`.

*A lost answer.* Our put of 42 lands, the answer does not. We read 42 back and find our nonce: committed. A
storage that fails the read too leaves us knowing nothing, and we say so: `CommitUnknown`.

*A late put.* The put of 42 gets no answer, and 42 cannot be found. That proves nothing: the request may still be on
its way. It would list a checkpoint whose files its writer has deleted, and perhaps no other. So that is neither yes
nor no: `CommitUnknown`, and nothing is deleted.

*A put that is visible but not durable.* On POSIX, ``link`` worked and the directory's fsync failed. Readers see the
record, a power loss may take it. That is neither yes nor no: `CommitUnknown`.

*A sleeper.* A read 41 and slept. B took over, committed 42 to 200 and swept the records below 100. A wakes up: 42
is free again and A's put succeeds, below the truth. A lists once more, finds records above 42 that do not descend
from its own, removes 42 and raises `Fenced`.

*A damaged record.* 42 listed a new checkpoint, then a bit of it flipped. 41 is the newest whole record, and a change
built on it would forget that checkpoint. So the complete attempts that 41 does not list are adopted again first.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial

from ckptman.errors import CommitUnknown, Fenced, FormatError, StorageError
from ckptman.format.catalog import MAX_RECORD_NBYTES, Entry, Record, Writer, read_record, write_record
from ckptman.format.digest import sha256
from ckptman.format.names import CATALOG, record_key
from ckptman.format.sealed import seal
from ckptman.repository.adopt import adopt
from ckptman.repository.head import Head, read_head, record_numbers
from ckptman.storage.base import KeyExists, KeyMissing, NotDurable, Storage

Change = Callable[[tuple[Entry, ...]], Sequence[Entry]]
"""What exists → what shall exist. Pure; called again for every try."""

TRIES = 50


def utc_now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def commit(
    storage: Storage,
    change: Change,
    *,
    root: str,
    what: str,
    writer_for: Callable[[Head], Writer],
    known: Record | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> Record:
    """
    Make *change* part of what exists, or prove that it is not.

    Durable when it returns. Each try carries a nonce that tells our own try, whose answer was lost, from another
    writer's. *writer_for* says who we are, given the newest record, or raises if we may not write on top of it. *known*
    is a record that was checked before: where the newest has exactly its bytes, it is not checked again.

    Raises:
        Fenced: A newer writer owns this root. Nothing of *change* exists.
        CommitUnknown: The storage failed and would not say. Read before deciding anything.
        StorageError: The storage failed and *change* does not exist, or others kept winning for 50 tries.
    """
    for _ in range(TRIES):
        head = read_head(storage, read=partial(_read, known))
        record = Record(
            root=root,
            number=head.number + 1,
            committed_at=_not_before(head, clock()),
            writer=writer_for(head),
            change=what,
            nonce=secrets.token_hex(16),
            previous=head.sha256,
            checkpoints=tuple(change(_base(storage, head))),
        )
        data = write_record(record)
        if _put(storage, record, data):
            _look_back(storage, record, data)
            return record
    raise StorageError(f"{what}: other writers of {storage.url} won {TRIES} times in a row; nothing was committed")


def _read(known: Record | None, data: bytes, number: int) -> Record:
    if known is not None and known.number == number and data == seal(known):
        return known
    return read_record(data, number)


def _not_before(head: Head, now: datetime) -> datetime:
    """
    *now*, or the latest moment that *head* knows of, if the clock was set back since.

    Whether a root dropped a checkpoint or lost it is told by when its newest record was committed (both.py).
    """
    record = head.record
    known = (record.committed_at, *(entry.created_at for entry in record.checkpoints)) if record else ()
    return max(now, *known) if known else now


def _base(storage: Storage, head: Head) -> tuple[Entry, ...]:
    listed = head.record.checkpoints if head.record else ()
    return adopt(storage, listed) if head.damaged else listed


def _put(storage: Storage, record: Record, data: bytes) -> bool:
    """Whether *record* is in the catalog now; False where another record took its number."""
    try:
        storage.create(record_key(record.number), data)
    except KeyExists as error:
        return _holds(storage, record, error)
    except NotDurable as error:
        raise CommitUnknown(
            f"{record.change}: record {record.number} of {storage.url} is visible, but the storage failed to make it "
            f"durable ({error}): it may vanish in a power loss"
        ) from error
    except StorageError as error:
        if not _holds(storage, record, error):
            if not error.may_take_effect:
                raise
            raise CommitUnknown(
                f"{record.change}: the storage did not answer when record {record.number} of {storage.url} was put "
                f"({error}). It is not there, but may still come: look with 'ckptman log' before deciding anything"
            ) from error
        _persist(storage, record)
    return True


def _persist(storage: Storage, record: Record) -> None:
    """The put failed and yet landed; on a filesystem its name may still be in the air."""
    try:
        storage.persist([CATALOG, ""])
    except StorageError as error:
        raise CommitUnknown(
            f"{record.change}: record {record.number} of {storage.url} is visible, but the storage failed to make it "
            f"durable ({error}): it may vanish in a power loss"
        ) from error


def _holds(storage: Storage, record: Record, cause: StorageError) -> bool:
    try:
        found = read_record(storage.read(record_key(record.number), limit=MAX_RECORD_NBYTES), record.number)
    except (KeyMissing, FormatError):
        return False
    except StorageError as error:
        raise CommitUnknown(
            f"{record.change}: putting record {record.number} of {storage.url} failed ({cause}), and so did reading "
            f"it back ({error}): the change is there or not. Look with 'ckptman log' before deciding anything"
        ) from error
    return found.nonce == record.nonce


def _look_back(storage: Storage, record: Record, data: bytes) -> None:
    """Find out whether we slept. The record is in the catalog: a storage that fails now tells us nothing of it."""
    try:
        _refuse_if_asleep(storage, record, data)
    except StorageError as error:
        raise CommitUnknown(
            f"{record.change}: record {record.number} of {storage.url} was put, but the storage failed when we looked "
            f"whether another writer had taken over ({error}): 'ckptman log' tells whether it stands"
        ) from error


def _refuse_if_asleep(storage: Storage, record: Record, data: bytes) -> None:
    numbers = record_numbers(storage)
    above = [number for number in numbers if number > record.number]
    if not above or _descends(storage, above[0], record, data):
        return
    if record.number not in numbers:
        raise CommitUnknown(
            f"{record.change}: record {record.number} of {storage.url} was put, and swept by another writer before we "
            "looked again: its successors say whether the change is part of them"
        )
    storage.delete([record_key(record.number)])
    raise Fenced(
        f"{record.change}: this writer (epoch {record.writer.epoch}) slept while others took {storage.url} over and "
        "went on; nothing was committed"
    )


def _descends(storage: Storage, number: int, record: Record, data: bytes) -> bool:
    if number != record.number + 1:
        return False
    try:
        return read_record(storage.read(record_key(number), limit=MAX_RECORD_NBYTES), number).previous == sha256(data)
    except (KeyMissing, FormatError):
        return True  # damaged or already swept right above ours: nobody skipped us
