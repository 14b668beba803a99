"""Listing again what a lost or damaged record listed: every attempt describes itself, so its manifest is enough."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ckptman.errors import FormatError
from ckptman.format.catalog import Entry, entry_of
from ckptman.format.digest import sha256
from ckptman.format.manifest import MAX_MANIFEST_NBYTES, read_manifest
from ckptman.format.names import manifest_key
from ckptman.repository.head import attempts, has_manifest
from ckptman.storage.base import KeyMissing, NotAFile, Storage


def adopt(storage: Storage, listed: Sequence[Entry]) -> tuple[Entry, ...]:
    """
    *listed*, and every complete attempt that it does not list, in the order of their commits.

    That order is told by the number of the record that each was written on top of. Of two attempts at one step the
    later one counts, with the tags that *listed* has for the step; tags that only the lost record had are lost. An
    attempt that was dropped, but not yet swept, comes back; one that the lost record dropped and its writer swept does
    not (the manifest goes first). Nothing that was acknowledged stays away.

    Raises:
        StorageError: An attempt could not be read (which is not the same as being damaged).
    """
    known = {entry.attempt for entry in listed}
    found = [complete_entry(storage, attempt) for attempt in attempts(storage) if attempt not in known]
    tags = {entry.step: entry.tags for entry in listed}
    left = [entry for entry in listed if has_manifest(storage, entry.attempt)]
    by_step: dict[int, Entry] = {}
    for entry in sorted([*left, *filter(None, found)], key=lambda entry: (entry.after, entry.created_at)):
        by_step.pop(entry.step, None)
        by_step[entry.step] = msgspec.structs.replace(entry, tags=tags.get(entry.step, ()))
    return tuple(by_step.values())


def complete_entry(storage: Storage, attempt: str) -> Entry | None:
    """The entry of *attempt* if its manifest is intact and every file has its size; None otherwise."""
    try:
        data = storage.read(manifest_key(attempt), limit=MAX_MANIFEST_NBYTES)
        manifest = read_manifest(data, attempt)
        if any(storage.size(file.path) != file.nbytes for file in manifest.files):
            return None
    except (KeyMissing, NotAFile, FormatError):
        return None
    return entry_of(manifest, sha256(data))
