"""
One save from many ranks, from what each has staged to what is committed.

1. Every rank writes its files under the attempt that rank 0 named, and makes them durable, with their names. A rank
   that fails is heard at once: the others break off between two slots (16 MiB) or files. One whose storage hangs in
   that moment leaves the call alone: see `_Handed`.
2. Every rank reports its files and tensors, or its error. Any error: the save fails on every rank with that error,
   and nothing exists.
3. Rank 0 puts the reports together, writes the manifest, commits, and tells every rank.

Where a rank is lost meanwhile, that may hide whether 3 came to its end; the catalog tells: `ckptman.pipeline.loss`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec

from ckptman.errors import CkptmanError, CommitUnknown, Fenced, LockTimeout, RankLost, SaveFailed, UnsupportedState
from ckptman.format.catalog import Entry
from ckptman.format.manifest import Component, File, Manifest, Tensor
from ckptman.format.names import rank_name
from ckptman.pipeline.arena import Slot
from ckptman.pipeline.engine import Source
from ckptman.pipeline.loss import find_out, give_up
from ckptman.pipeline.ranks import BrokenOff, Ranks
from ckptman.pipeline.reports import Report, joined, report_of
from ckptman.pipeline.saving import Job, Saved, commit_entry, manifest_of, put_manifest
from ckptman.pipeline.sharing import Shared
from ckptman.pipeline.stream import StagingStopped
from ckptman.pipeline.writing import write_files
from ckptman.repository.ownership import Ownership
from ckptman.repository.repository import checkpoint_of
from ckptman.storage.base import Storage

_log = logging.getLogger("ckptman")

SLOW_S = 60.0
"""After how long a storage that does not answer is worth a warning."""


class _Outcome(msgspec.Struct, frozen=True):
    """What rank 0 committed, and the steps that the keep rule dropped with it."""

    entry: Entry
    pruned: list[int]


class Turn:
    """
    A rank's turn in a save: it is heard exactly once, by ``write`` or, where staging failed before, by ``abandon``.

    Args:
        ranks: All of them.
        storage: The root.
        owner: On rank 0: the right to change it.
        job: The save.
        shared: Who writes what.
    """

    def __init__(self, ranks: Ranks, storage: Storage, owner: Ownership | None, job: Job, shared: Shared) -> None:
        self.job = job
        self._ranks = ranks
        self._storage = storage
        self._owner = owner
        self._shared = shared
        self._mutex = threading.Lock()  # guards the one below
        self._is_taken = False

    def write(self, source: Source) -> Saved:
        """Write this rank's part, and commit the whole: see `write_together`."""
        if not self._take():
            raise StagingStopped("staging failed")
        return write_together(self._ranks, self._storage, self._owner, self.job, self._shared, source)

    def abandon(self, error: BaseException) -> None:
        """
        Tell all ranks that staging failed here with *error*; raises that on all of them. Nothing after ``write``.

        After Ctrl-C and the like it raises on the others only: here it is the caller who raises that.
        """
        if not self._take():
            return

        def part() -> bytes:
            raise failed(self.job.step, error if isinstance(error, Exception) else RuntimeError(repr(error)))

        try:
            self._ranks.conclude(part)
        except CkptmanError as told:
            if isinstance(error, Exception):
                raise failed(self.job.step, told) from error
        finally:
            if self._owner is not None:
                self._owner.discard(self._shared.attempt)

    def _take(self) -> bool:
        with self._mutex:
            was_taken, self._is_taken = self._is_taken, True
        return not was_taken


def write_together(
    ranks: Ranks, storage: Storage, owner: Ownership | None, job: Job, shared: Shared, source: Source
) -> Saved:
    """
    Write this rank's part of *job*, and commit the whole; the checkpoint is durable when this returns. Collective.

    Args:
        ranks: All of them.
        storage: The root.
        owner: On rank 0: the right to change it.
        job: The save. Its values count where ranks share them and this is rank 0, or where they are this rank's own.
        shared: The attempt, and what this rank has of its own.
        source: What this rank writes.

    Returns:
        The checkpoint; and as a manifest what of it this rank wrote or borrowed.

    Raises:
        SaveFailed: Nothing was committed. The same on every rank; the text names the rank at fault.
        Fenced: Another writer took the root over; nothing was committed.
        CommitUnknown: A rank or the storage was lost, and nobody would say whether the commit landed.
    """
    written: list[Manifest] = []

    def part() -> bytes:
        files, tensors = _write_part(ranks, storage, job, shared, source)
        written.append(_own_manifest(job, shared.attempt, files, tensors))
        own = {name: (job.captured[name].kind, job.captured[name].values) for name in shared.own_values}
        return msgspec.msgpack.encode(report_of(files, tensors, own))

    def conclusion(parts: list[bytes]) -> bytes:
        assert owner is not None
        reports = [msgspec.msgpack.decode(one, type=Report) for one in parts]
        try:
            manifest = _manifest(owner, job, shared.attempt, reports)
            entry, pruned = commit_entry(owner, job, put_manifest(storage, manifest, tags=job.tags))
        except Exception as error:
            raise failed(job.step, error) from error
        return msgspec.msgpack.encode(_Outcome(entry, list(pruned)))

    try:
        outcome = msgspec.msgpack.decode(ranks.conclude(part, conclusion), type=_Outcome)
    except CommitUnknown:
        raise  # it may be listed
    except RankLost as lost:
        if owner is not None:
            raise give_up(owner, job.step, shared.attempt, lost) from lost
        outcome = _Outcome(find_out(storage, job.step, shared.attempt, shared.after, lost, rank=ranks.rank), [])
    except CkptmanError:
        if owner is not None:
            owner.discard(shared.attempt)
        raise
    return Saved(
        checkpoint=checkpoint_of(outcome.entry, storage.url),
        manifest=written[0],
        pruned=tuple(outcome.pruned),
    )


def failed(step: int, error: Exception) -> CkptmanError:
    """What a save of *step* that failed with *error* raises on every rank."""
    if isinstance(error, (Fenced, LockTimeout, SaveFailed, CommitUnknown, UnsupportedState)):
        return error
    return SaveFailed(f"saving step {step} failed, nothing was committed: {error}", step=step)


def _write_part(
    ranks: Ranks, storage: Storage, job: Job, shared: Shared, source: Source
) -> tuple[list[File], list[Tensor]]:
    handed = _Handed(source)
    slow = _Slow(f"rank {ranks.rank} (host {ranks.host}), saving step {job.step}", handed)
    try:
        return ranks.attended(
            lambda stop: _written(storage, shared, source, handed, stop), left_alone=handed.lose, look=slow.look
        )
    except (BrokenOff, RankLost):
        raise
    except Exception as error:
        raise failed(job.step, error) from error


def _written(
    storage: Storage, shared: Shared, source: Source, handed: _Handed, stop: threading.Event
) -> tuple[list[File], list[Tensor]]:
    files, tensors = write_files(storage, shared.attempt, source.files, handed.until(stop), source.arena)
    if stop.is_set():
        raise BrokenOff("another rank failed")
    if files:
        storage.persist([shared.attempt])  # perhaps another machine than that of rank 0 made the names
    source.confirm()
    return [*files, *source.borrowed.files], [*tensors, *source.borrowed.behind(len(files))]


class _Handed:
    """
    The slots of a part on their way to the thread that writes them, which may have to be left alone in a call.

    1. Rank 2's fsync hangs. Rank 1 fails; rank 2 is to break off, waits a few seconds, and leaves its thread alone.
    2. The slot that the thread writes from, if it was in a write, is counted out of the arena: it is never filled again
       while somebody may read it. All other slots are in the stream, which gives them back.
    3. Rank 2 reports that it broke off; the attempt is discarded on rank 0, and its name is never used again.
    4. The fsync returns at last. The thread gives its slot back, which frees it, looks at ``stop``, and ends. It has no
       way to report or to commit; a file that it finished is garbage in a folder that no record lists.
    """

    def __init__(self, source: Source) -> None:
        self._slots = source.slots
        self._arena = source.arena
        self._out: Slot | None = None
        self.out_since: float | None = time.monotonic()  # None while a slot is waited for

    def until(self, stop: threading.Event) -> Iterator[Slot]:
        """Every slot; raises `BrokenOff` in place of the next one once *stop* is set."""
        slots = iter(self._slots)
        while not stop.is_set() and (slot := self._next(slots)) is not None:
            self._out = slot
            yield slot
            self._out = None  # who asks for the next one has given it back
        if stop.is_set():
            raise BrokenOff("another rank failed")

    def _next(self, slots: Iterator[Slot]) -> Slot | None:
        self.out_since = None
        slot = next(slots, None)
        self.out_since = time.monotonic()
        return slot

    def lose(self) -> None:
        """Count out the slot that is being written."""
        out = self._out
        if out is not None:
            self._arena.lose(out)


class _Slow:
    """
    Says that a storage takes long: slow is not lost, so all ranks wait for it, and somebody should know for whom.

    After `SLOW_S` without a slot (16 MiB) or the end of a file, and again whenever that time has doubled.
    """

    def __init__(self, who: str, handed: _Handed) -> None:
        self._who = who
        self._handed = handed
        self._since: float | None = None  # of the call that was last seen
        self._next_s = SLOW_S

    def look(self) -> None:
        """To be called now and then."""
        since = self._handed.out_since
        if since != self._since:
            self._since, self._next_s = since, SLOW_S
        if since is not None and (seconds := time.monotonic() - since) >= self._next_s:
            self._next_s = 2 * seconds
            _log.warning("%s: its storage has not answered for %.0f s; all ranks wait for it", self._who, seconds)


def _manifest(owner: Ownership, job: Job, attempt: str, reports: Sequence[Report]) -> Manifest:
    files, tensors = joined(reports)
    manifest = manifest_of(owner, job, attempt, after=owner.newest.number, files=files, tensors=tensors)
    own = {
        rank_name(name, rank): Component(kind=kind, values=msgspec.Raw(values))
        for rank, report in enumerate(reports)
        for name, (kind, values) in report.own.items()
    }
    names = {tensor.name for tensor in tensors}
    return msgspec.structs.replace(
        manifest,
        world_size=len(reports),
        components={**manifest.components, **own},
        aliases={alias: name for alias, name in manifest.aliases.items() if name in names and alias not in names},
    )


def _own_manifest(job: Job, attempt: str, files: Sequence[File], tensors: Sequence[Tensor]) -> Manifest:
    """What one rank knows to be right in the new checkpoint: what it may borrow from."""
    return Manifest(
        root="",
        step=job.step,
        attempt=attempt,
        after=0,
        created_at=job.created_at,
        world_size=1,
        metrics={},
        preempted=False,
        components={},
        files=tuple(files),
        tensors=tuple(tensors),
        aliases={},
        environment={},
    )
