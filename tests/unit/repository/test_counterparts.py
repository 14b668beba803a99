"""Checkpoints of two roots: which are the same, what a mirror should get, and in which order a restore goes through."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from ckptman.format.catalog import Entry
from ckptman.repository import keep
from ckptman.repository.both import of_both, seen_until
from ckptman.repository.counterparts import counterpart, due, in_the_way, missing, place
from ckptman.repository.head import read_head
from ckptman.repository.ownership import take
from ckptman.storage.memory import MemoryStorage

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def at(minute: int) -> datetime:
    return BEGAN + timedelta(minutes=minute)


def one(step: int, *, minute: int | None = None, tags: tuple[str, ...] = (), loss: float = 0.0) -> Entry:
    """A checkpoint of the source, saved at *minute* (by default its step)."""
    minute = step if minute is None else minute
    return Entry(
        step=step,
        attempt=f"step-{step:012d}.w0001.{minute:08x}",
        manifest="0" * 64,
        after=minute,
        created_at=at(minute),
        nbytes=step,
        new_nbytes=step,
        world_size=1,
        components=("x",),
        metrics={"loss": loss},
        tags=tags,
    )


def copied(entry: Entry) -> Entry:
    """Its copy: everything that a copy has of its own differs."""
    attempt = f"step-{entry.step:012d}.w0007.{entry.after + 4096:08x}"
    return msgspec.structs.replace(entry, attempt=attempt, manifest="1" * 64, after=99, new_nbytes=0, tags=())


def test_a_copy_is_known_by_what_it_shares_with_its_original() -> None:
    """Another moment, another metric or another step is another checkpoint."""
    entry = one(5)
    assert counterpart(entry, [copied(one(4)), copied(entry)]) == copied(entry)
    for other in (one(5, minute=6), one(5, loss=1.0), msgspec.structs.replace(entry, nbytes=6), one(6)):
        assert counterpart(entry, [copied(other)]) is None
    assert missing([one(1), one(2)], [copied(one(2))]) == [one(1)]
    assert in_the_way([one(1), one(2)], [copied(one(2)), one(1, minute=9), one(3)]) == [one(1, minute=9)]


def test_places_are_those_of_the_source() -> None:
    """Before the first later one that is there; last where there is none."""
    source = [one(1), one(2), one(3)]
    assert [place(entry, source, [copied(one(2))]) for entry in source] == [0, 1, 1]
    assert place(one(1), source, [one(50), copied(one(3))]) == 1
    assert place(one(1), source, [one(50)]) == 1


def test_a_mirror_gets_what_it_lacks_and_would_keep_newest_first() -> None:
    """Its own rule decides, as if it had everything; what it has of old takes part."""
    source = [one(n) for n in (1, 2, 3, 4)]
    steps = lambda there, rule: [entry.step for entry in due(source, there, rule, "")]
    assert steps([], keep.everything) == [4, 3, 2, 1]
    assert steps([], keep.last(2)) == [4, 3]
    assert steps([copied(one(4))], keep.last(2)) == [3]
    assert steps([copied(one(3)), copied(one(4))], keep.last(2)) == []
    assert steps([copied(one(0)), copied(one(1))], keep.last(1)) == [4]
    assert steps([one(4, minute=50)], keep.last(9)) == [4, 3, 2, 1], "a step that was saved again is replaced"


def test_a_mirror_gets_tags_that_it_lacks() -> None:
    """Of what it has; a tag that it alone has stays there."""
    tagged = one(2, tags=("best",))
    there = [copied(one(1, tags=("old",))), copied(tagged)]
    assert due([one(1), tagged], there, keep.last(1), "") == [tagged]
    assert due([one(1), tagged], [there[0], msgspec.structs.replace(there[1], tags=("best",))], keep.last(1), "") == []


@pytest.mark.parametrize(
    ("own", "seen", "mirrored", "order"),
    [
        ([1, 2], 3, [1, 2], ["m1", "1", "m2", "2"]),
        ([], None, [1, 2], ["m1", "m2"]),
        ([], 9, [1, 2], ["m1", "m2"]),
        ([1], 1, [1, 2, 3], ["m1", "1", "m2", "m3"]),
        ([1, 2], 9, [1, 2, 3], ["m1", "1", "m3", "m2", "2"]),
        ([5, 6], 7, [1, 2, 6], ["m1", "m2", "5", "m6", "6"]),
        ([1, 6], 7, [1, 2, 6], ["m1", "1", "m2", "m6", "6"]),
        ([9, 3], 10, [4, 9], ["m4", "m9", "9", "3"]),
    ],
    ids=[
        "same",
        "wiped",
        "emptied",
        "lost the newest",
        "deleted the newest",
        "pruned",
        "pruned between",
        "rolled back",
    ],
)
def test_the_order_of_a_restore(own: list[int], seen: int | None, mirrored: list[int], order: list[str]) -> None:
    """Lost ones are newer than all; dropped ones never newer than the newest; the root's own before its copy."""
    placed = of_both([one(n) for n in own], None if seen is None else at(seen), [copied(one(n)) for n in mirrored])
    assert [f"{'m' if p.is_mirrored else ''}{p.entry.step}" for p in placed] == order
    assert len({p.key for p in placed}) == len(placed)


def test_a_writer_that_only_took_over_has_seen_nothing() -> None:
    """The newest record with a change counts; a root without any has lost everything."""
    storage = MemoryStorage()
    assert seen_until(storage, read_head(storage)) is None
    for _ in range(2):
        take(storage, timeout_s=0).release()
    assert seen_until(storage, read_head(storage)) is None
    owner = take(storage, timeout_s=0)
    changed = owner.commit(tuple, "delete step 5").committed_at
    owner.release()
    take(storage, timeout_s=0).release()
    assert seen_until(storage, read_head(storage)) == changed
