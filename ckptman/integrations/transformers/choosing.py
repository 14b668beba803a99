"""Which checkpoint a call of ``train`` continues. Knows nothing of transformers, and nothing of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ckptman.errors import CheckpointNotFound, IntegrityError
from ckptman.format.catalog import Entry
from ckptman.repository.repository import Repository, all_damaged, find, warn_passed_over
from ckptman.repository.verify import verify
from ckptman.storage.base import Storage

Resume = Literal["auto", "must", "never", "best"] | int
"""``"auto"``: the newest intact one, or a fresh start; ``"must"``: never a fresh start; ``"best"``; or a step."""

WORDS = ("auto", "must", "never", "best")

BEST = "best"
"""The tag of the best checkpoint by ``metric_for_best_model``; it is never pruned."""


def check_resume(resume: object) -> Resume:
    """Return *resume* if it is one of ours. Raises ValueError."""
    is_step = isinstance(resume, int) and not isinstance(resume, bool) and resume >= 0
    if is_step or resume in WORDS:
        return resume  # type: ignore[return-value]  # it was just compared with all there are
    raise ValueError(f"resume must be one of {', '.join(map(repr, WORDS))} or a step, got {resume!r}")


def choose(storage: Storage, resume: Resume) -> int | None:
    """
    The step to continue from; None to start afresh.

    For ``"auto"`` and ``"must"`` every byte of the checkpoint is read and checked here, because the Trainer asks for
    its own state long before there is an optimizer to restore: what is found damaged later could not be taken back.

    Raises:
        CheckpointNotFound: There is none such; or none at all, and *resume* is ``"must"``.
        IntegrityError: There are checkpoints, and all of them are damaged.
        FormatError: The newest is of a newer format, or this is no root of ours.
        StorageError: The medium failed.
    """
    if resume == "never":
        return None
    repository = Repository(storage)
    entries = repository.entries()
    if resume == "best" or isinstance(resume, int):
        return find(entries, resume, storage.url).step
    if entries:
        return _newest_intact(repository, entries)
    if resume == "must":
        raise CheckpointNotFound(f"{storage.url} has no checkpoint, and resume='must' forbids a fresh start")
    return None


def _newest_intact(repository: Repository, entries: Sequence[Entry]) -> int:
    url = repository.storage.url
    damaged = []
    for entry in reversed(entries):
        reason = _damage(repository, entry)
        if reason is None:
            return entry.step
        damaged.append((entry.step, reason))
        warn_passed_over(entry.step, url, reason)
    raise all_damaged(damaged, url, afresh="resume='never' or another root")


def _damage(repository: Repository, entry: Entry) -> str | None:
    try:
        repository.manifest(entry)  # one of a newer format is no damage: its FormatError goes to the caller
    except IntegrityError as error:
        return str(error)
    faults = verify(repository, entry)
    return faults[0].what if faults else None
