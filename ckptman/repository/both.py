"""
The checkpoints of a root and of its mirror, in one order: what a restore goes through from its end.

- Of a checkpoint that both have, the root's own comes after the mirror's: it is read first, and the mirror's instead of
  it where it is damaged.
- What only the mirror has, the root has either lost or dropped. It has *lost* what was saved after its newest record
  was committed (all, if it has no record): that is newer than whatever it has. It has *dropped* the rest; perhaps a
  person deleted it, so none of it counts as newer than the newest checkpoint of the root.
- Besides, each keeps the order of its root, and what only the mirror has takes its place by the time of its saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ckptman.errors import FormatError
from ckptman.format.catalog import MAX_RECORD_NBYTES, Entry, read_record
from ckptman.format.names import record_key
from ckptman.repository.counterparts import identity
from ckptman.repository.head import Head
from ckptman.repository.ownership import TAKE_OVER
from ckptman.storage.base import KeyMissing, Storage


@dataclass(frozen=True, slots=True)
class Placed:
    """A checkpoint, and whether it is the mirror's."""

    entry: Entry
    is_mirrored: bool

    @property
    def key(self) -> tuple[str, bool]:
        """What tells it from all others."""
        return self.entry.attempt, self.is_mirrored


def of_both(own: Sequence[Entry], seen_until: datetime | None, mirrored: Sequence[Entry]) -> list[Placed]:
    """All of a root that knew what was saved before *seen_until* (None: nothing), and of its mirror, oldest first."""
    copies = {identity(entry): entry for entry in mirrored}
    groups = [_group(entry, copies.get(identity(entry))) for entry in own]
    known = {identity(entry) for entry in own}
    lost: list[Placed] = []
    older, newest = groups[:-1], groups[-1:]
    for entry in mirrored:
        if identity(entry) in known:
            continue
        if seen_until is None or entry.created_at > seen_until:
            lost.append(Placed(entry, True))
        else:
            older.insert(_by_time(older, entry), [Placed(entry, True)])
    return [placed for group in (*older, *newest, lost) for placed in group]


def _group(entry: Entry, copy: Entry | None) -> list[Placed]:
    return [*([Placed(copy, True)] if copy is not None else []), Placed(entry, False)]


def _by_time(groups: Sequence[Sequence[Placed]], entry: Entry) -> int:
    later = (index for index, group in enumerate(groups) if group[-1].entry.created_at > entry.created_at)
    return next(later, len(groups))


def seen_until(storage: Storage, head: Head) -> datetime | None:
    """
    When the newest record of *storage* that changed anything was committed; None if there is none.

    A writer that took over and saved nothing did not look at what exists: it tells nothing of what was lost.
    """
    record = head.record
    while record is not None and record.change == TAKE_OVER:
        if record.number == 1:
            return None
        try:
            data = storage.read(record_key(record.number - 1), limit=MAX_RECORD_NBYTES)
            record = read_record(data, record.number - 1)
        except (KeyMissing, FormatError):
            return record.committed_at
    return None if record is None else record.committed_at
