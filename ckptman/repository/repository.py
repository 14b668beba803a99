"""The noun: a root, as a reader sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from ckptman.errors import CheckpointNotFound, FormatError, IntegrityError
from ckptman.format.catalog import Entry, Record, read_record
from ckptman.format.digest import sha256
from ckptman.format.manifest import MAX_MANIFEST_NBYTES, Manifest, read_manifest
from ckptman.format.metrics import metrics_from_json
from ckptman.format.names import manifest_key
from ckptman.repository.head import Head, read_head
from ckptman.repository.keep import Mode, ranked
from ckptman.repository.ownership import refuse_unlisted
from ckptman.storage.base import KeyMissing, NotAFile, Storage, lacking
from ckptman.types import Checkpoint
from ckptman.warning import warn

Which = int | str


class DamagedCheckpointWarning(UserWarning):
    """A damaged checkpoint or catalog record was passed over."""


class Repository:
    """
    A root and its checkpoints, read without a lock. Never writes.

    Each call reads the catalog anew: one listing and one read, however many checkpoints there are.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def head(self, *, read: Callable[[bytes, int], Record] = read_record) -> Head:
        """
        The newest whole record, as *read* makes it of its bytes and number.

        Warns (`DamagedCheckpointWarning`) if newer records are damaged.

        Raises:
            FormatError: There are checkpoints, but no readable record; or the root has a newer format.
            StorageError: The catalog could not be read.
        """
        head = read_head(self.storage, read=read)
        if head.record is None:
            try:
                refuse_unlisted(self.storage)
            except FormatError:
                head = read_head(self.storage, read=read)  # the first checkpoint may just have come: look once more
                if head.record is None:
                    raise
        for number in head.damaged:
            warn(
                f"catalog record {number} of {self.storage.url} is damaged and was passed over: the change that it "
                "made is not visible until the next save or 'ckptman repair'",
                DamagedCheckpointWarning,
            )
        return head

    def entries(self) -> tuple[Entry, ...]:
        """What exists, oldest commit first. Raises as ``head`` does."""
        record = self.head().record
        return record.checkpoints if record else ()

    def checkpoints(self) -> list[Checkpoint]:
        """What exists, oldest commit first. Raises as ``head`` does."""
        url = self.storage.url
        return [checkpoint_of(entry, url) for entry in self.entries()]

    def checkpoint(self, entry: Entry) -> Checkpoint:
        """*entry* as people see it."""
        return checkpoint_of(entry, self.storage.url)

    def manifest(self, entry: Entry) -> Manifest:
        """
        The manifest of *entry*, checked against the digest that the catalog has of it.

        Raises:
            IntegrityError: It is missing, or its bytes differ from what was committed.
            FormatError: It is of a newer format.
        """
        return read_manifest(self.manifest_data(entry), entry.attempt)

    def manifest_data(self, entry: Entry) -> bytes:
        """The bytes of the manifest of *entry*, checked. Raises as ``manifest`` does."""
        key = manifest_key(entry.attempt)
        try:
            data = self.storage.read(key, limit=MAX_MANIFEST_NBYTES)
        except (KeyMissing, NotAFile) as error:
            raise IntegrityError(f"step {entry.step}: {key} {lacking(error)}", step=entry.step, file=key) from error
        if sha256(data) != entry.manifest:
            raise IntegrityError(
                f"step {entry.step}: {key} is damaged: its sha256 is not the one in the catalog",
                step=entry.step,
                file=key,
            )
        return data


def checkpoint_of(entry: Entry, url: str) -> Checkpoint:
    """*entry* of the root at *url* as people see it."""
    return Checkpoint(
        step=entry.step,
        created_at=entry.created_at,
        metrics=metrics_from_json(entry.metrics),
        tags=entry.tags,
        nbytes=entry.nbytes,
        new_nbytes=entry.new_nbytes,
        world_size=entry.world_size,
        components=entry.components,
        url=f"{url.rstrip('/')}/{entry.attempt}",
        preempted=entry.preempted,
    )


def warn_passed_over(step: int, url: str, reason: object) -> None:
    """Warn that the damaged checkpoint *step* of the root at *url* is not what is read."""
    warn(
        f"step {step} of {url} is damaged and was passed over for an older one, or a copy: {reason}",
        DamagedCheckpointWarning,
    )


def all_damaged(faults: Sequence[tuple[int, object]], url: str, *, afresh: str = "another root") -> IntegrityError:
    """
    What is raised where every checkpoint of the root at *url* is damaged.

    *faults* are steps and reasons; *afresh* is what to use in order to start without them.
    """
    told = "; ".join(f"step {step}: {reason}" for step, reason in faults)
    return IntegrityError(
        f"all {len(faults)} checkpoints of {url} are damaged, and none was restored: {told}. "
        f"'ckptman verify' lists all damage; use {afresh} to start afresh"
    )


def find(entries: Sequence[Entry], which: Which, url: str) -> Entry:
    """
    The entry that *which* means: ``"latest"``, a step, ``"best:METRIC"``, ``"best:METRIC:max"``, or a tag.

    Raises:
        CheckpointNotFound: There is none.
        TypeError, ValueError: *which* has no meaning.
    """
    if isinstance(which, bool) or not isinstance(which, (int, str)):
        raise TypeError(f"which must be a step, 'latest', 'best:<metric>:<mode>' or a tag, got {which!r}")
    if not entries:
        raise CheckpointNotFound(f"{url} has no checkpoint")
    if which == "latest":
        return entries[-1]
    if isinstance(which, str) and which.startswith("best:"):
        return _best(entries, which.removeprefix("best:"), url)
    for entry in entries:
        if which == entry.step or which in entry.tags:
            return entry
    have = ", ".join(str(entry.step) for entry in entries[-10:])
    what = f"step {which}" if isinstance(which, int) else f"checkpoint tagged {which!r}"
    raise CheckpointNotFound(f"{url} has no {what}; it has steps {'… ' if len(entries) > 10 else ''}{have}")


def _best(entries: Sequence[Entry], rule: str, url: str) -> Entry:
    metric, colon, mode = rule.rpartition(":")
    if not colon or mode not in ("min", "max"):
        metric, mode = rule, "min"
    first = next(iter(ranked([checkpoint_of(entry, url) for entry in entries], metric, cast(Mode, mode))), None)
    if first is None:
        names = sorted({name for entry in entries for name in entry.metrics})
        raise CheckpointNotFound(
            f"no checkpoint of {url} has the metric {metric!r}; there are: {', '.join(names) or '-'}"
        )
    return next(entry for entry in entries if entry.step == first.step)
