"""
Rebuilding a catalog that is lost or damaged, from the manifests that every checkpoint carries.

Nothing that can be read is changed: repair adds one record on top, and replaces a marker that is unreadable.
Checkpoints that are damaged themselves stay listed (``restore`` passes over them); delete them when you are sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptman.errors import FormatError
from ckptman.format.catalog import Entry
from ckptman.format.manifest import MAX_MANIFEST_NBYTES, read_manifest
from ckptman.format.names import MARKER, manifest_key
from ckptman.format.sealed import NewerFormat
from ckptman.repository.adopt import adopt, complete_entry
from ckptman.repository.head import attempts, has_manifest, read_head
from ckptman.repository.ownership import MAX_MARKER_NBYTES, read_marker, take, write_marker
from ckptman.storage.base import KeyMissing, Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """
    What repair would do.

    Attributes:
        marker: What is wrong with ``ckptman.json``; None if nothing is.
        damaged_records: Numbers of damaged records above the newest whole one.
        has_record: Whether there is a whole record.
        adopted: Complete attempts that would be listed again.
        incomplete: Attempts with a manifest that cannot be listed: damaged, or files missing.
    """

    marker: str | None
    damaged_records: tuple[int, ...]
    has_record: bool
    adopted: tuple[Entry, ...]
    incomplete: tuple[str, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether there is nothing to repair."""
        return self.marker is None and not self.damaged_records and not self.adopted and not self.incomplete


def diagnose(storage: Storage) -> Diagnosis:
    """
    Look at the root's marker and catalog; read every manifest only if a record is damaged or missing.

    Raises:
        FormatError: The root is of a newer format.
        StorageError: The medium failed.
    """
    head = read_head(storage)
    listed: Sequence[Entry] = head.record.checkpoints if head.record else ()
    needs_adoption = head.record is None or bool(head.damaged)
    known = {entry.attempt for entry in listed}
    return Diagnosis(
        marker=_marker_fault(storage, is_new=not head.number and not attempts(storage)),
        damaged_records=head.damaged,
        has_record=head.record is not None,
        adopted=tuple(e for e in adopt(storage, listed) if e.attempt not in known) if needs_adoption else (),
        incomplete=tuple(_incomplete(storage, known)) if needs_adoption else (),
    )


def repair(storage: Storage, *, timeout_s: float) -> Diagnosis:
    """
    Mend what `diagnose` finds, as the writer of the root; return what was done.

    Raises:
        LockTimeout: Another process is the writer and stays it.
        FormatError, StorageError: As `diagnose`.
    """
    found = diagnose(storage)
    if found.is_healthy:
        return found
    lost_record = not found.has_record
    take(
        storage,
        timeout_s=timeout_s,
        change=(lambda entries: adopt(storage, entries)) if lost_record else tuple,
        what=f"repair: {len(found.adopted)} checkpoints listed again",
        mend=_mended,
    ).release()
    return found


def _incomplete(storage: Storage, known: set[str]) -> list[str]:
    candidates = [name for name in attempts(storage) if name not in known and has_manifest(storage, name)]
    return [name for name in candidates if complete_entry(storage, name) is None]


def _marker_fault(storage: Storage, *, is_new: bool) -> str | None:
    # A new root has no marker, or half of one: without hard links, a kill while it is put leaves that.
    try:
        read_marker(storage.read(MARKER, limit=MAX_MARKER_NBYTES), storage.url)
    except KeyMissing:
        return None if is_new else f"{MARKER} is missing"
    except NewerFormat:
        raise
    except FormatError:
        return f"{MARKER} is damaged"
    return None


def _mended(storage: Storage) -> str:
    """The id of the root; its marker is replaced if it cannot be read. To be called by the holder of the lock."""
    if _marker_fault(storage, is_new=False) is None:
        return read_marker(storage.read(MARKER, limit=MAX_MARKER_NBYTES), storage.url)
    storage.delete([MARKER])
    return write_marker(storage, _root_id(storage))


def _root_id(storage: Storage) -> str | None:
    """The id that the newest whole record, or else any whole manifest, has of this root; None if none is left."""
    record = read_head(storage).record
    if record is not None:
        return record.root
    for name in attempts(storage):
        try:
            return read_manifest(storage.read(manifest_key(name), limit=MAX_MANIFEST_NBYTES), name).root
        except (KeyMissing, FormatError):
            continue
    return None
