"""
Checkpoints of two roots, compared: which are the same, which are missing, which stand in the way. Pure.

A copy has a folder, a manifest and borrowed files of its own. What it shares with its original is the moment at which
it was saved, to the microsecond, and all that the catalog says of its contents: that is how both know each other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from ckptman.format.catalog import Entry
from ckptman.repository.changes import retained
from ckptman.repository.keep import Keep


def identity(entry: Entry) -> Hashable:
    """Equal for a checkpoint and its copies, wherever they are, and for nothing else."""
    metrics = tuple(sorted((name, str(value)) for name, value in entry.metrics.items()))
    return entry.step, entry.created_at, entry.nbytes, entry.world_size, entry.components, entry.preempted, metrics


def counterpart(entry: Entry, others: Iterable[Entry]) -> Entry | None:
    """The one of *others* that is the same checkpoint as *entry*; None if there is none."""
    return next((other for other in others if other.step == entry.step and identity(other) == identity(entry)), None)


def missing(entries: Iterable[Entry], others: Sequence[Entry]) -> list[Entry]:
    """Those of *entries* that have no counterpart among *others*."""
    known = {identity(other) for other in others}
    return [entry for entry in entries if identity(entry) not in known]


def in_the_way(entries: Iterable[Entry], others: Sequence[Entry]) -> list[Entry]:
    """Those of *others* that are other checkpoints at the steps of *entries*: a copy would replace them."""
    steps = {entry.step for entry in missing(entries, others)}
    return [other for other in others if other.step in steps]


def place(entry: Entry, source: Sequence[Entry], others: Sequence[Entry]) -> int:
    """
    Where *entry* of *source* belongs among *others*: before the first counterpart of one that is later in *source*.

    So a copy of an older checkpoint does not become the latest of a root that has the newer ones already; where
    *others* has none of those, it comes last.
    """
    later = {identity(one) for one in source[[one.attempt for one in source].index(entry.attempt) + 1 :]}
    return next((index for index, other in enumerate(others) if identity(other) in later), len(others))


def due(source: Sequence[Entry], there: Sequence[Entry], keep: Keep, url: str) -> list[Entry]:
    """
    What of *source* a root at *url*, with the checkpoints *there* and its own rule *keep*, should get; newest first.

    That is: what it lacks and would keep, and that of which it lacks a tag.
    """
    lacking = missing(source, there)
    merged = _merged(source, lacking, there)
    kept = {entry.attempt for entry in retained(merged, keep, url)} if merged else set()
    copied = {identity(entry): entry for entry in there}
    untagged = [e for e in source if identity(e) in copied and not set(e.tags) <= set(copied[identity(e)].tags)]
    wanted = {entry.attempt for entry in lacking if entry.attempt in kept} | {entry.attempt for entry in untagged}
    return [entry for entry in reversed(source) if entry.attempt in wanted]


def _merged(source: Sequence[Entry], lacking: Sequence[Entry], there: Sequence[Entry]) -> list[Entry]:
    """What would be there with all that is *lacking*, each in its place, and in the place of others of its step."""
    steps = {entry.step for entry in lacking}
    absent = {entry.attempt for entry in lacking}
    waiting: list[Entry] = []
    before: dict[Hashable, list[Entry]] = {}  # what comes before a copy of one that is there
    for entry in source:
        if entry.attempt in absent:
            waiting.append(entry)
        else:
            before[identity(entry)], waiting = waiting, []
    merged = []
    for entry in there:
        if entry.step not in steps:
            merged += [*before.get(identity(entry), ()), entry]
    return [*merged, *waiting]
