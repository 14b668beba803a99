"""Checking what all checkpoints hang on: the root's marker, and the chain of catalog records."""

from __future__ import annotations

from collections.abc import Iterator

from ckptman.errors import FormatError
from ckptman.format.catalog import MAX_RECORD_NBYTES, Record, read_record
from ckptman.format.digest import sha256
from ckptman.format.names import MARKER, record_key
from ckptman.format.sealed import Torn
from ckptman.repository.head import record_numbers
from ckptman.repository.ownership import MAX_MARKER_NBYTES, read_marker
from ckptman.repository.verify import Fault
from ckptman.storage.base import KeyMissing, Storage


def catalog_faults(storage: Storage) -> list[Fault]:
    """
    All that is wrong with the marker and with the records that were not swept yet.

    Raises:
        FormatError: A record is of a newer format, or breaks the format though its digest is right.
        StorageError: The medium failed.
    """
    return [*_marker_faults(storage), *_record_faults(storage)]


def _marker_faults(storage: Storage) -> Iterator[Fault]:
    try:
        read_marker(storage.read(MARKER, limit=MAX_MARKER_NBYTES), storage.url)
    except KeyMissing:
        yield Fault(file=MARKER, tensor=None, what=f"{MARKER} is missing: run 'ckptman repair {storage.url}'")
    except FormatError as error:
        yield Fault(file=MARKER, tensor=None, what=str(error))


def _record_faults(storage: Storage) -> Iterator[Fault]:
    below: tuple[Record, str] | None = None
    for number in record_numbers(storage):
        key = record_key(number)
        try:
            data = storage.read(key, limit=MAX_RECORD_NBYTES)
            record = read_record(data, number)
        except KeyMissing:
            continue  # swept by a live writer since we listed
        except Torn as error:
            yield Fault(file=key, tensor=None, what=str(error))
            continue
        if below is not None and record.previous != below[1]:
            what = f"catalog record {number} does not follow record {below[0].number}: the digests disagree"
            yield Fault(file=key, tensor=None, what=what)
        below = record, sha256(data)
