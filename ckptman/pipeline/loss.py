"""
What became of a save during which a rank was lost.

Every attempt is named on top of a record, number *n* say. Rank 0 lists it in a record, or gives it up, before it
begins anything else. So the first record above *n* tells:

    it lists the attempt       committed
    it does not                it will never be

*Rank 2 is killed while it writes.* Rank 0 waits for its report, and finds out. It commits a record that says so, and
raises. Rank 1, which waits for the outcome, is told that rank 2 was lost, and finds that record.

*Rank 0 is killed.* If that was after the commit, the others find the attempt listed. If it was before, nobody would
ever write the next record. So the lowest rank that is left becomes the writer, which is such a record, and from which
on rank 0 could not commit any more even if it were alive; then it lets go of the root. A lock of files that is not free
shows that rank 0 lives. The lease of a bucket shows nothing for half a minute, so it is passed over: all are to know
what happened within 30 s of a death, and what makes the root safe is the record.

*Nobody writes one in time* (rank 0 lives, holds the lock, and cannot be reached): `CommitUnknown`.
"""

from __future__ import annotations

import contextlib
import time

from ckptman.errors import CkptmanError, CommitUnknown, Fenced, LockTimeout, RankLost, SaveFailed
from ckptman.format.catalog import Entry
from ckptman.repository.head import read_head
from ckptman.repository.ownership import Ownership, depose, take
from ckptman.storage.base import Storage

PATIENCE_S = 8.0
"""How long to look for the record that tells. Rank 0 writes it in the moment in which it finds out itself."""

SUCCESSION_S = 4.0
"""How long the one that takes over waits for rank 0: for the end of its lock, or for its record."""

_PAUSE_S = 0.1


def give_up(owner: Ownership, step: int, attempt: str, lost: RankLost) -> CkptmanError:
    """For rank 0: never list *attempt*, and let the others know; return what is to be raised."""
    owner.discard(attempt)
    with contextlib.suppress(CkptmanError):  # then the others will not know, and say so
        owner.commit(tuple, f"give up step {step}: {lost}"[:200])
    return failure(step, lost)


def failure(step: int, lost: RankLost) -> SaveFailed:
    """What is raised where a lost rank has cost the save of *step*."""
    return SaveFailed(f"saving step {step} failed, nothing was committed: {lost}", step=step)


def find_out(storage: Storage, step: int, attempt: str, after: int, lost: RankLost, *, rank: int) -> Entry:
    """
    For any other rank: how the catalog lists *attempt*, which was named on top of record *after*.

    Raises:
        SaveFailed: It is not listed, and never will be.
        CommitUnknown: Nobody can tell.
    """
    began = time.monotonic()
    survivors = (one for one in range(1, rank + 1) if one not in lost.ranks)
    is_successor = (not lost.ranks or 0 in lost.ranks) and next(survivors, None) == rank
    while True:
        try:
            if is_successor and (storage.lock_path is not None or time.monotonic() > began + SUCCESSION_S):
                is_successor = False
                _succeed(storage, after, f"give up step {step}: {lost}"[:200])
            entries = _told(storage, after)
        except (LockTimeout, Fenced):
            entries = None
        except CkptmanError as error:
            raise _unknown(step, storage, lost) from error
        if entries is not None:
            entry = next((entry for entry in entries if entry.attempt == attempt), None)
            if entry is None:
                raise failure(step, lost) from lost
            return entry
        if time.monotonic() > began + PATIENCE_S:
            raise _unknown(step, storage, lost) from lost
        time.sleep(_PAUSE_S)


def _succeed(storage: Storage, after: int, what: str) -> None:
    """Put the record that rank 0 will never put. Raises LockTimeout where it lives, Fenced where one is there."""
    if storage.lock_path is None:
        depose(storage, after=after, what=what)
    else:
        take(storage, timeout_s=SUCCESSION_S, what=what).release()


def _told(storage: Storage, after: int) -> tuple[Entry, ...] | None:
    """What exists by a record above *after*; None where there is none yet."""
    head = read_head(storage)
    return head.record.checkpoints if head.record is not None and head.record.number > after else None


def _unknown(step: int, storage: Storage, lost: RankLost) -> CommitUnknown:
    return CommitUnknown(
        f"saving step {step}: {lost}; whether the commit landed nobody says. 'ckptman log {storage.url}' tells"
    )
