"""
The changes that are made to what exists: pure functions from the entries before to the entries after.

`repository.commit.commit` calls a change again for every try, on what exists by then.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from ckptman.errors import CheckpointNotFound, StorageError
from ckptman.format.catalog import Entry
from ckptman.repository.commit import Change
from ckptman.repository.keep import Keep
from ckptman.repository.repository import checkpoint_of, find


def tagging(step: int, name: str, url: str) -> Change:
    """The change that gives *step* the tag *name*, and takes it from any other checkpoint."""

    def tagged(entry: Entry) -> Entry:
        if entry.step != step:
            return without_tags(entry, (name,))
        return msgspec.structs.replace(entry, tags=tuple(dict.fromkeys((*entry.tags, name))))

    def change(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        find(entries, step, url)
        return tuple(map(tagged, entries))

    return change


def untagging(step: int, name: str, url: str) -> Change:
    """The change that takes the tag *name* from *step*. Raises `CheckpointNotFound` if it has no such tag."""

    def change(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        if name not in find(entries, step, url).tags:
            raise CheckpointNotFound(f"step {step} of {url} has no tag {name!r}")
        return tuple(without_tags(entry, (name,)) if entry.step == step else entry for entry in entries)

    return change


def deleting(steps: Collection[int], url: str) -> Change:
    """The change that drops *steps*, tagged or not. Raises `CheckpointNotFound` if one does not exist."""

    def change(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        dropped = {find(entries, step, url).step for step in steps}
        return tuple(entry for entry in entries if entry.step not in dropped)

    return change


def pruning(keep: Keep, url: str, *, attempts: Collection[str]) -> Change:
    """The change that drops those of *attempts* that `retained` does not keep, and nothing else."""

    def change(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        kept = {entry.attempt for entry in retained(entries, keep, url)}
        return tuple(entry for entry in entries if entry.attempt in kept or entry.attempt not in attempts)

    return change


def with_checkpoint(entries: Sequence[Entry], entry: Entry, *, ours: Collection[str] = ()) -> list[Entry]:
    """
    *entries* with *entry* as the newest: it replaces one of its step and takes over its tags; tags move to it.

    *ours* are files that it may borrow though nothing lists them yet: the writer knows that nobody deletes them.

    Raises:
        StorageError: It borrows a file that none of *entries* owns or borrows: that may be deleted at any moment.
    """
    _check_borrows(entries, entry, ours)
    replaced = next((e for e in entries if e.step == entry.step), None)
    if replaced is not None:
        entry = msgspec.structs.replace(entry, tags=tuple(dict.fromkeys((*replaced.tags, *entry.tags))))
    others = [e for e in entries if e.step != entry.step]
    return [*(without_tags(e, entry.tags) for e in others), entry]


def _check_borrows(entries: Sequence[Entry], entry: Entry, ours: Collection[str]) -> None:
    owners = {e.attempt for e in entries}
    lent = {key for e in entries for key in e.borrows}.union(ours)
    for key in entry.borrows:
        if key.partition("/")[0] not in owners and key not in lent:
            raise StorageError(f"step {entry.step} borrows {key}, which no checkpoint needs any more", key=key)


def without_tags(entry: Entry, tags: Sequence[str]) -> Entry:
    """*entry* without those of its tags that are among *tags*."""
    if not set(tags).intersection(entry.tags):
        return entry
    return msgspec.structs.replace(entry, tags=tuple(tag for tag in entry.tags if tag not in tags))


def retained(entries: Sequence[Entry], keep: Keep, url: str) -> list[Entry]:
    """Those of *entries* that *keep* keeps, and those that always stay: the newest, and tagged ones."""
    kept = keep([checkpoint_of(entry, url) for entry in entries])
    return [entry for entry in entries if entry.step in kept or entry.tags or entry is entries[-1]]
