"""
Which files of a source are at the destination of a copying already, so that they need not be sent again.

1. Files that this copying sent, or that a checkpoint of the destination needs which is a copy of one of the source.
2. Files that an earlier copying sent before it was killed. They are read and checked before they count.

The second kind is of an older epoch, and no record lists it: any other writer deletes such files (sweep.py). It is safe
to point at them all the same, since nobody can be about to delete them: every record between them and us was made by
a copying that dropped nothing, which the first word of its change says; such a copying deletes nothing before it says
otherwise in a record, and never what it sent itself, not even where it fails.

And they are durable. A filesystem shows files that are half written and files that were never fsynced; but a copying
writes the files of a folder in the order of their names, the manifest last, and begins none before the one before it
is durable. So there the last file of a folder does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from ckptman.errors import FormatError, IntegrityError
from ckptman.format.catalog import MAX_RECORD_NBYTES, Entry, Record, read_record
from ckptman.format.manifest import File, Manifest
from ckptman.format.names import MANIFEST, check_attempt, record_key
from ckptman.repository.counterparts import counterpart
from ckptman.repository.reading import CheckedReader, Part, parts_of
from ckptman.repository.repository import Repository
from ckptman.repository.sweep import unlisted
from ckptman.storage.base import KeyMissing, Storage

COPY = "copy "
"""How the change of a record begins that a copying made, and that dropped nothing."""

_Checked = tuple[int, int, tuple[str, ...]]
"""A part of a file that was compared with its digests: its place, and these."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file of the source is at the destination, and which of its parts are known to be right there."""

    key: str
    checked: set[_Checked]


class Arrived:
    """
    The files of *source* that are at *target*, whose newest record, ours, is *record*. For one thread.

    Attributes:
        ours: Keys that a checkpoint may borrow though none has needed them so far.
    """

    def __init__(self, source: Repository, target: Storage, record: Record) -> None:
        self.ours: set[str] = set()
        self._source = source
        self._target = target
        self._places: dict[str, _Place] = {}  # by the path at the source
        self._left = list(_left_by_copyings(target, record))

    def find(self, file: File, parts: Sequence[Part], manifest: Manifest, entries: Sequence[Entry]) -> str | None:
        """
        The key of *file* at the destination, which has the checkpoints *entries*; None if it must be sent.

        What of its *parts* was not checked on the way there is read there and checked.
        """
        for place in self._candidates(file, entries):
            if self._is_right(file, place, parts, manifest):
                self._places[file.path] = place
                return place.key
        return None

    def sent(self, file: File, parts: Sequence[Part], key: str) -> None:
        """*file* was sent to *key*, and all of its *parts* were checked."""
        self.ours.add(key)
        self._places[file.path] = _Place(key, set(map(_checked, parts)))

    def learn(self, files: Sequence[File], source: Sequence[Entry], entries: Sequence[Entry]) -> None:
        """Find *files* through other checkpoints of *source* that need them too and have copies among *entries*."""
        for file in files:
            for other in source:
                if file.path not in self._places and _needs(other, file.path):
                    there = counterpart(other, entries)
                    if there is not None:
                        self._compare(other, there)

    def forget_left(self) -> None:
        """What earlier copyings left is about to be swept."""
        self._left = []

    def _candidates(self, file: File, entries: Sequence[Entry]) -> Iterator[_Place]:
        known = self._places.get(file.path)
        if known is not None and (known.key in self.ours or any(_needs(entry, known.key) for entry in entries)):
            yield known
        for key in _durable(self._target, self._left, file):
            self.ours.add(key)
            yield _Place(key, set())

    def _is_right(self, file: File, place: _Place, parts: Sequence[Part], manifest: Manifest) -> bool:
        unchecked = [part for part in parts if _checked(part) not in place.checked]
        moved = msgspec.structs.replace(file, path=place.key)
        reader = CheckedReader(self._target, manifest)
        try:
            if self._target.size(place.key) != file.nbytes:
                return False
            if unchecked or not place.checked:
                reader.header(moved)
                for _ in reader.chunks(moved, unchecked, lambda tensor, chunk: None):
                    pass
        except (KeyMissing, IntegrityError):
            return False
        place.checked.update(map(_checked, unchecked))
        return True

    def _compare(self, original: Entry, copy: Entry) -> None:
        """A copy keeps the order of its files, and each has the size and the header that it had."""
        try:
            here, there = self._source.manifest(original), Repository(self._target).manifest(copy)
        except (IntegrityError, FormatError):
            return  # damaged on one side: it teaches nothing
        for file, other, parts in zip(here.files, there.files, parts_of(there), strict=False):
            if (file.nbytes, file.header_digest) == (other.nbytes, other.header_digest):
                self._places.setdefault(file.path, _Place(other.path, set(map(_checked, parts))))


def _checked(part: Part) -> _Checked:
    return part.chunk.start, part.chunk.nbytes, part.chunk.digests


def _needs(entry: Entry, key: str) -> bool:
    return key in entry.borrows or key.startswith(f"{entry.attempt}/")


def _left_by_copyings(target: Storage, record: Record) -> Iterator[str]:
    """The folders below *record* that no record lists, and that nobody can be about to delete."""
    names = unlisted(target, record)
    epochs = _epochs_of_copyings(target, record) if names else frozenset()
    return (name for name in names if check_attempt(name).epoch in epochs)


def _epochs_of_copyings(target: Storage, record: Record) -> frozenset[int]:
    """Of the writers below *record*, down to the first record that tells of anything else than pure copying."""
    epochs: set[int] = set()
    for number in range(record.number - 1, 0, -1):
        try:
            below = read_record(target.read(record_key(number), limit=MAX_RECORD_NBYTES), number)
        except (KeyMissing, FormatError):
            return frozenset()  # who made it, nobody knows
        if not below.change.startswith(COPY):
            return frozenset(epochs - {below.writer.epoch})
        epochs.add(below.writer.epoch)
    return frozenset(epochs)


def _durable(target: Storage, folders: Sequence[str], file: File) -> Iterator[str]:
    """Keys in *folders* that have the step, the name and the size of *file*, and are durable if they are whole."""
    folder, _, name = file.path.partition("/")
    for left in folders:
        if check_attempt(left).step == check_attempt(folder).step:
            sizes = {stored.key.partition("/")[2]: stored.nbytes for stored in target.listing(left)}
            # Only filesystems have file locks, and only they show what is not durable.
            counting = sizes.keys() if target.lock_path is None or MANIFEST in sizes else sorted(sizes)[:-1]
            if name in counting and sizes[name] == file.nbytes:
                yield f"{left}/{name}"
