"""
Copying checkpoints from one root to another, as the writer of the other.

A copy is a new attempt of the destination's writer: its folder has that writer's epoch, so the rule by which folders
are garbage (sweep.py) holds for it as for a save. The bytes of the data files are those of the source; the manifest is
the source's, with the destination's root, folders, and place in its history. Metrics, tags and times stay.

1. Become the writer of the destination, without sweeping yet.
2. For each checkpoint: send the files that are not there, in the order of their names, each checked on its way; then
   the manifest; make all names durable; commit one record. Readers see whole checkpoints only.
3. At the end, sweep what was left by earlier copyings.

A file that several checkpoints of the source need is sent once. Where the checkpoint that owns it is not copied, the
file gets a folder without a manifest: what is left of a lender that was dropped, too.

Killed in between, a copying leaves whole checkpoints, and files that the next one need not send (arrived.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from ckptman.errors import StorageError
from ckptman.format.catalog import Entry, entry_of
from ckptman.format.digest import sha256
from ckptman.format.manifest import File, Manifest, write_manifest
from ckptman.format.names import Attempt, check_attempt, manifest_key
from ckptman.pipeline.sending import Progress, send
from ckptman.repository.arrived import COPY, Arrived
from ckptman.repository.changes import retained, with_checkpoint, without_tags
from ckptman.repository.counterparts import counterpart, place
from ckptman.repository.keep import Keep, everything
from ckptman.repository.ownership import Ownership, take
from ckptman.repository.reading import Part, parts_of
from ckptman.repository.repository import Repository
from ckptman.repository.sweep import tidy, unlisted
from ckptman.storage.base import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """
    A checkpoint that is at the destination now.

    Attributes:
        entry: As the destination lists it.
        sent_nbytes: Bytes of the files that had to be sent.
        is_new: False where the destination had it already.
        dropped: Steps that the keep rule dropped in the same commit.
    """

    entry: Entry
    sent_nbytes: int = 0
    is_new: bool = True
    dropped: tuple[int, ...] = ()


@dataclass(slots=True)
class _Trip:
    """One try at copying one checkpoint: its folder at the destination, and others for what it borrows."""

    manifest: Manifest
    epoch: int
    progress: Progress
    sent_nbytes: int = 0
    folders: dict[str, str] = field(default_factory=dict)  # attempt of the source → its folder at the destination

    def folder(self, attempt: str) -> str:
        """A fresh one for each attempt of the source, since files of one folder are written in their order."""
        if attempt not in self.folders:
            step, nonce = check_attempt(attempt).step, secrets.token_hex(4)
            self.folders[attempt] = str(Attempt(step=step, epoch=self.epoch, nonce=nonce))
        return self.folders[attempt]


def begin(
    source: Storage, target: Storage, *, timeout_s: float, on_succession: Callable[[], object] = lambda: None
) -> Copying:
    """
    Become the writer of *target*, which is made if it does not exist, to copy checkpoints of *source* to it.

    Raises:
        LockTimeout, FormatError, StorageError: As `repository.ownership.take`.
        ValueError: Both are the same root.
    """
    if source.identity == target.identity:
        raise ValueError(f"{source.url} and {target.url} are the same root")
    what = f"{COPY}from {source.url}"
    owner = take(target, timeout_s=timeout_s, what=what, sweeps=False, on_succession=on_succession)
    return Copying(Repository(source), owner)


class Copying:
    """
    Copies checkpoints of *source* as *owner*, the writer of the destination. Made by `begin`; for one thread.

    A checkpoint whose copying failed may be tried again: files that were sent are not sent twice.
    """

    def __init__(self, source: Repository, owner: Ownership) -> None:
        self._source = source
        self._owner = owner
        self._target = owner.storage
        self._arrived = Arrived(source, owner.storage, owner.newest)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What the destination has, as far as we know: nobody else may change it."""
        return self._owner.newest.checkpoints

    def copy(
        self,
        entry: Entry,
        source: Sequence[Entry],
        *,
        keep: Keep = everything,
        replace: bool = False,
        progress: Progress = lambda nbytes: None,
    ) -> Copied:
        """
        Copy the checkpoint *entry*, one of those that the *source* lists; durable and committed when it returns.

        It takes the place among the checkpoints of the destination that it has among those of the source; where the
        destination has no later one of the source, it becomes the latest. What the destination has already is not
        copied again; it gets the tags that it lacks.

        Raises:
            IntegrityError: The source's checkpoint is damaged, or was dropped meanwhile: look whether it is listed.
            Fenced: Another writer took the destination over.
            CommitUnknown: The destination would not say whether the commit landed.
            StorageError: One of the two failed; or the destination has another checkpoint at this step, and *replace*
                is not given.
        """
        self._owner.check()
        there = counterpart(entry, self.entries)
        if there is not None:
            progress(entry.nbytes)
            return Copied(entry=self._tagged(there, entry.tags), is_new=False)
        if not replace and any(other.step == entry.step for other in self.entries):
            raise StorageError(f"{self._target.url} has another checkpoint at step {entry.step}, and it was to stay")
        trip = _Trip(self._source.manifest(entry), self._owner.writer.epoch, progress)
        self._arrived.learn(trip.manifest.files, source, self.entries)
        later = self.entries[place(entry, source, self.entries) :]
        copy = self._write_manifest(trip, self._bring_all(trip), later)
        return self._commit(msgspec.structs.replace(copy, tags=entry.tags), later, trip.sent_nbytes, keep)

    def tidy(self) -> None:
        """
        Sweep what earlier copyings, and other writers that are gone, left at the destination.

        A record that is none of a copying goes first, so that no later copying points at what is about to be deleted.
        """
        garbage = unlisted(self._target, self._owner.newest)
        if garbage:
            self._arrived.forget_left()
            self._owner.commit(tuple, "tidy up after copying")
            tidy(self._target, self._owner.newest, garbage)

    def release(self) -> None:
        """Let another process become the writer of the destination."""
        self._owner.release()

    def _bring_all(self, trip: _Trip) -> list[File]:
        """The files of the checkpoint as they are at the destination, after what was not there was sent."""
        files, parts = trip.manifest.files, parts_of(trip.manifest)
        keys: dict[int, str] = {}
        for index in sorted(range(len(files)), key=lambda index: files[index].path):
            keys[index] = self._bring(trip, files[index], parts[index], taken=keys.values())
        return [msgspec.structs.replace(file, path=keys[index]) for index, file in enumerate(files)]

    def _bring(self, trip: _Trip, file: File, parts: Sequence[Part], *, taken: Collection[str]) -> str:
        there = self._arrived.find(file, parts, trip.manifest, self.entries)
        if there is not None and there not in taken:
            trip.progress(file.nbytes)
            return there
        attempt, _, name = file.path.partition("/")
        key = f"{trip.folder(attempt)}/{name}"
        send(self._source.storage, trip.manifest, file, parts, self._target, key, progress=trip.progress)
        trip.sent_nbytes += file.nbytes
        self._arrived.sent(file, parts, key)
        return key

    def _write_manifest(self, trip: _Trip, files: Sequence[File], later: Sequence[Entry]) -> Entry:
        """``after`` orders checkpoints where the catalog is lost: not above that of those that come *later*."""
        attempt = trip.folder(trip.manifest.attempt)
        after = min([self._owner.newest.number, *(entry.after for entry in later)])
        manifest = msgspec.structs.replace(
            trip.manifest, root=self._owner.root, attempt=attempt, after=after, files=tuple(files)
        )
        data = write_manifest(manifest)
        with self._target.open_new(manifest_key(attempt)) as out:
            out.write(data)
        self._target.persist([*sorted({attempt, *(file.path.partition("/")[0] for file in files)}), ""])
        return entry_of(manifest, sha256(data))

    def _commit(self, copy: Entry, later: Sequence[Entry], sent_nbytes: int, keep: Keep) -> Copied:
        url = self._target.url
        behind = {entry.attempt for entry in later}

        def change(entries: tuple[Entry, ...]) -> list[Entry]:
            *others, newest = with_checkpoint(entries, copy, ours=self._arrived.ours)
            at = next((index for index, entry in enumerate(others) if entry.attempt in behind), len(others))
            return retained([*others[:at], newest, *others[at:]], keep, url)

        before, left = self.entries, {entry.attempt for entry in change(self.entries)}
        gone = [entry.step for entry in before if entry.attempt not in left]
        self._owner.commit(change, f"{'prune and copy: ' if gone else COPY}step {copy.step}")
        entry = next((one for one in self.entries if one.attempt == copy.attempt), copy)
        dropped = tuple(step for step in gone if step != copy.step)
        return Copied(entry=entry, sent_nbytes=sent_nbytes, dropped=dropped)

    def _tagged(self, there: Entry, tags: Sequence[str]) -> Entry:
        lacking = tuple(tag for tag in tags if tag not in there.tags)
        if not lacking:
            return there
        tagged = msgspec.structs.replace(there, tags=(*there.tags, *lacking))

        def change(entries: tuple[Entry, ...]) -> list[Entry]:
            return [tagged if e.attempt == there.attempt else without_tags(e, lacking) for e in entries]

        self._owner.commit(change, f"{COPY}tags of step {there.step}")
        return tagged
