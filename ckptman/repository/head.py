"""Reading the catalog: the newest record that is whole, and what had to be passed over to find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptman.errors import StorageError
from ckptman.format.catalog import MAX_RECORD_NBYTES, Record, read_record
from ckptman.format.digest import sha256
from ckptman.format.names import CATALOG, Attempt, manifest_key, record_key, record_number
from ckptman.format.sealed import Torn
from ckptman.storage.base import KeyMissing, Storage

LISTINGS = 20
"""How often the catalog may be swept under a reader's feet before the reader gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """
    The catalog at one moment.

    Attributes:
        number: The highest number that is taken, by a whole record or by a damaged one; 0 for an empty catalog.
        record: The newest whole record; None where there is none.
        data: That record's file.
        damaged: Numbers above ``record`` whose bytes are wrong, newest first.
    """

    number: int = 0
    record: Record | None = None
    data: bytes = b""
    damaged: tuple[int, ...] = ()

    @property
    def sha256(self) -> str | None:
        """Of the newest whole record's file; None where there is none."""
        return None if self.record is None else sha256(self.data)


def read_head(storage: Storage, *, read: Callable[[bytes, int], Record] = read_record) -> Head:
    """
    The newest whole record, as *read* makes it of its bytes and number: first list, then from the highest number down.

    List *first*: a record that lands between a read and a later listing would give us a number above it with
    contents from below it, and overwrite it in effect.

    Raises:
        StorageError: The catalog could not be listed or a record could not be read. It is never passed over.
        FormatError: The newest record is whole, but of a newer format or not a record.
    """
    for _ in range(LISTINGS):
        numbers = record_numbers(storage)
        if not numbers:
            return Head()
        damaged: list[int] = []
        try:
            for number in reversed(numbers):
                data = storage.read(record_key(number), limit=MAX_RECORD_NBYTES)
                try:
                    record = read(data, number)
                except Torn:
                    damaged.append(number)
                    continue
                return Head(number=numbers[-1], record=record, data=data, damaged=tuple(damaged))
            return Head(number=numbers[-1], damaged=tuple(damaged))
        except KeyMissing:
            continue  # swept between our listing and our read, so there are newer ones: list again
    raise StorageError(f"the catalog of {storage.url} changed {LISTINGS} times while it was being read: try again")


def record_numbers(storage: Storage) -> list[int]:
    """The numbers of all records, lowest first, whole or damaged. Foreign files are ignored."""
    numbers = (record_number(stored.key) for stored in storage.listing(CATALOG))
    return sorted(number for number in numbers if number is not None)


def attempts(storage: Storage) -> list[str]:
    """The names of all attempt folders, listed by a record or not. Foreign folders are ignored."""
    return [folder for folder in storage.folders() if Attempt.parse(folder) is not None]


def has_manifest(storage: Storage, attempt: str) -> bool:
    """Whether *attempt* got as far as its manifest, which is written last."""
    return any(stored.key == manifest_key(attempt) for stored in storage.listing(attempt))


def read_history(storage: Storage) -> Iterator[tuple[int, Record | None]]:
    """Every record that was not swept yet, oldest first; None stands for a damaged one."""
    for number in record_numbers(storage):
        try:
            yield number, read_record(storage.read(record_key(number), limit=MAX_RECORD_NBYTES), number)
        except Torn:
            yield number, None
        except KeyMissing:
            continue
