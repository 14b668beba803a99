"""
Deleting what no record lists or borrows.

Who may delete what, and why it is safe:

- What a commit of ours just dropped: the record without it is durable, and no later record can list it again.
- Attempts of *older epochs* that no record lists: their writers are fenced and can never commit them.
- Our own attempt of which we know that it failed.
- Never "whatever is not in the newest record": a sweeper that slept would delete its successor's work.

A reader may be in the middle of what is deleted. It reads the catalog again and finds its checkpoint gone.
Only manifests and data files are deleted; whatever else lies in a root, or in an attempt's folder, is not ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from ckptman.errors import StorageError
from ckptman.format.catalog import Entry, Record
from ckptman.format.names import CATALOG, MANIFEST, Attempt, record_key
from ckptman.repository.head import attempts, record_numbers
from ckptman.storage.base import Storage, Stored

_log = logging.getLogger("ckptman")

KEPT_RECORDS = 100
"""How many records stay, for ``ckptman log``, and as older truths to fall back to."""


def tidy(storage: Storage, record: Record, candidates: Iterable[str], *, swept: Record | None = None) -> None:
    """
    Sweep *candidates* and old records after *record* was committed.

    *swept* is the record after which this was done before, by the same writer: nothing is looked for that was there
    then. That saves a listing for every commit.

    A storage that fails here fails nothing: the commit stands, and what stays is swept by the next writer.
    """
    try:
        sweep_attempts(storage, record, candidates)
        sweep_records(storage, record, swept=swept)
    except StorageError as error:
        _log.warning("%s: could not delete what is no longer needed, the next writer will: %s", storage.url, error)


def clear_up(storage: Storage, record: Record) -> None:
    """
    Sweep what writers before that of *record* left when they were killed. A storage that fails here fails nothing.

    Half a marker in the root is among it. Nobody else is writing one now: there is a record, and so a marker.
    """
    tidy(storage, record, unlisted(storage, record))
    try:
        storage.remove_temporaries("")
    except StorageError as error:
        _log.warning("%s: could not delete unfinished files, the next writer will: %s", storage.url, error)


def unlisted(storage: Storage, record: Record) -> list[str]:
    """Attempts that *record* does not list and that its writer may therefore sweep: those of older epochs."""
    listed = {entry.attempt for entry in record.checkpoints}
    return [name for name in attempts(storage) if name not in listed and _epoch(name) < record.writer.epoch]


def _epoch(name: str) -> int:
    attempt = Attempt.parse(name)
    assert attempt is not None
    return attempt.epoch


def sweep_attempts(storage: Storage, record: Record, candidates: Iterable[str]) -> None:
    """Delete the files of *candidates* that *record* neither lists nor borrows, and unfinished temporary ones there."""
    listed = {entry.attempt for entry in record.checkpoints}
    for attempt in candidates:
        if attempt not in listed:
            storage.delete([stored.key for stored in garbage(storage, record.checkpoints, [attempt])])
            storage.remove_temporaries(attempt)


def no_longer_needed(before: Sequence[Entry], after: Sequence[Entry]) -> list[str]:
    """The attempts of which a change from *before* to *after* may have made files garbage: its own, and lenders."""
    left = {entry.attempt for entry in after}
    gone = [entry for entry in before if entry.attempt not in left]
    return sorted(
        {entry.attempt for entry in gone} | {key.partition("/")[0] for entry in gone for key in entry.borrows}
    )


def garbage(storage: Storage, left: Sequence[Entry], candidates: Iterable[str]) -> list[Stored]:
    """
    The files of the attempts *candidates* that none of the entries *left* owns or borrows. Deletes nothing.

    Each attempt's manifest comes first, so that a sweep that was cut short never leaves what looks complete.
    """
    listed = {entry.attempt for entry in left}
    borrowed = {key for entry in left for key in entry.borrows}
    found: list[Stored] = []
    for attempt in candidates:
        if attempt not in listed:
            files = [stored for stored in storage.listing(attempt) if stored.key not in borrowed]
            ours = [stored for stored in files if _is_ours(stored.key.removeprefix(f"{attempt}/"))]
            found += sorted(ours, key=lambda stored: not stored.key.endswith(f"/{MANIFEST}"))
    return found


def _is_ours(name: str) -> bool:
    return name == MANIFEST or (name.endswith(".safetensors") and "/" not in name)


def sweep_records(storage: Storage, record: Record, *, swept: Record | None = None) -> None:
    """
    Delete records that are more than `KEPT_RECORDS` below *record*, lowest first, and torn temporary files.

    After *swept*, if there is one, only the records that have become old since.
    """
    oldest = record.number - KEPT_RECORDS  # of those that go it is the newest
    if swept is None:
        storage.delete([record_key(number) for number in record_numbers(storage) if number <= oldest])
        storage.remove_temporaries(CATALOG)
    elif oldest > 0:
        storage.delete([record_key(number) for number in range(max(1, swept.number - KEPT_RECORDS + 1), oldest + 1)])
