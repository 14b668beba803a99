"""
Which checkpoint all ranks restore: rank 0 resolves it; if any finds damage, all walk back to the same older one.

Rank 0 reads the catalog and the manifest and tells both, so these are read once, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ckptman.errors import CheckpointNotFound, IntegrityError
from ckptman.format.catalog import Entry
from ckptman.format.manifest import Manifest, read_manifest
from ckptman.pipeline.ranks import Ranks
from ckptman.repository.repository import Repository, Which, find
from ckptman.types import Checkpoint, Skipped


class _Damage(msgspec.Struct, frozen=True, array_like=True):
    """Why an attempt was passed over."""

    attempt: str
    step: int
    reason: str


class _Chosen(msgspec.Struct, frozen=True):
    """What to restore next (None: there is nothing), and all that was passed over so far."""

    entry: Entry | None
    manifest: bytes
    passed_over: list[_Damage]


Load = Callable[[Entry, Manifest], Checkpoint]
"""Loads a checkpoint on all ranks, or raises the same on all; IntegrityError where one of them found damage."""


def recall(
    ranks: Ranks,
    repository: Repository,
    which: Which,
    *,
    entries: Callable[[], Sequence[Entry]],
    load: Load,
    pass_over: Callable[[int, str], Skipped],
) -> tuple[Checkpoint | None, tuple[Skipped, ...]]:
    """
    Load the checkpoint that *which* means on all ranks. Collective.

    Args:
        ranks: All of them.
        repository: The root.
        which: As `CheckpointManager.restore` takes it.
        entries: Called on rank 0: what exists.
        load: Called on all ranks.
        pass_over: Called on all ranks with the step and the reason for each checkpoint that is passed over.

    Returns:
        What was loaded (None: the latest was asked for, and there is none), and what was passed over.

    Raises:
        CkptmanError: As `CheckpointManager.restore` says; the same on every rank.
    """
    passed_over: list[_Damage] = []
    damaged: tuple[Entry, IntegrityError] | None = None
    while True:
        chosen = _choose(ranks, repository, which, entries, passed_over, damaged)
        for damage in chosen.passed_over[len(passed_over) :]:
            pass_over(damage.step, damage.reason)
        passed_over = chosen.passed_over
        skipped = tuple(Skipped(step=damage.step, reason=damage.reason) for damage in passed_over)
        if chosen.entry is None:
            return None, skipped
        try:
            return load(chosen.entry, read_manifest(chosen.manifest, chosen.entry.attempt)), skipped
        except IntegrityError as error:
            damaged = chosen.entry, error


def _choose(
    ranks: Ranks,
    repository: Repository,
    which: Which,
    entries: Callable[[], Sequence[Entry]],
    passed_over: list[_Damage],
    damaged: tuple[Entry, IntegrityError] | None,
) -> _Chosen:
    def choose(_: list[bytes]) -> bytes:
        over, fault = list(passed_over), damaged
        while True:
            found = entries()
            if fault is not None:
                _judge(*fault, which, over, found, repository.storage.url)
            entry = _next(found, which, over, repository.storage.url)
            if entry is None:
                return msgspec.msgpack.encode(_Chosen(None, b"", over))
            try:
                data = repository.manifest_data(entry)
            except IntegrityError as error:
                fault = entry, error
            else:
                return msgspec.msgpack.encode(_Chosen(entry, data, over))

    return msgspec.msgpack.decode(ranks.conclude(bytes, choose), type=_Chosen)


def _judge(
    entry: Entry, error: IntegrityError, which: Which, over: list[_Damage], found: Sequence[Entry], url: str
) -> None:
    """Note that *entry* is damaged, if the latest is wanted. One that was dropped while it was read is not damaged."""
    if entry not in found:
        if which != "latest":
            raise CheckpointNotFound(f"step {entry.step} of {url} was deleted while it was read") from error
    elif which != "latest":
        raise error
    else:
        over.append(_Damage(entry.attempt, entry.step, str(error)))


def _next(found: Sequence[Entry], which: Which, over: list[_Damage], url: str) -> Entry | None:
    if which != "latest":
        return find(found, which, url)
    attempts = {damage.attempt for damage in over}
    entry = next((entry for entry in reversed(found) if entry.attempt not in attempts), None)
    if entry is None and over:
        raise all_damaged([(damage.step, damage.reason) for damage in over], url)
    return entry


def all_damaged(damages: Sequence[tuple[int, str]], url: str) -> IntegrityError:
    """What is raised where every checkpoint of the root at *url* is damaged."""
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damages)
    return IntegrityError(
        f"all {len(damages)} checkpoints of {url} are damaged, and none was restored: {reasons}. "
        "'ckptman verify' lists all damage; use another root to start afresh"
    )
