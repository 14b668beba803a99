"""Retention rules: pure functions of the history."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptman import keep
from ckptman.types import Checkpoint

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(step: int, *, loss: float | None = None, hours: float = 0) -> Checkpoint:
    return Checkpoint(
        step=step,
        created_at=START + timedelta(hours=hours),
        metrics={} if loss is None else {"loss": loss},
        tags=(),
        nbytes=0,
        new_nbytes=0,
        world_size=1,
        components=(),
        url="",
    )


def test_last_counts_commits_not_steps() -> None:
    """After a rollback the branch that went on counts as the newest."""
    assert keep.last(2)([at(10), at(20), at(5), at(6)]) == {5, 6}


def test_best_ignores_nan_and_prefers_the_later_of_equals() -> None:
    """NaN is never best; of two equal ones the later stays; max turns the order round."""
    history = [at(1, loss=0.5), at(2, loss=math.nan), at(3, loss=0.5), at(4, loss=math.inf), at(5)]
    assert keep.best("loss")(history) == {3}
    assert keep.best("loss", 2)(history) == {3, 1}
    assert keep.best("loss", 1, mode="max")(history) == {4}
    assert keep.best("accuracy", 3)(history) == frozenset()


def test_every_and_everything() -> None:
    """Multiples, or all of them."""
    history = [at(step) for step in range(0, 100, 7)]
    assert keep.every(14)(history) == set(range(0, 100, 14))
    assert keep.everything(history) == set(range(0, 100, 7))


def test_hours_keep_the_last_of_each_window() -> None:
    """One per window, and the choice for a closed window does not change as time goes on."""
    history = [at(i, hours=i / 4) for i in range(16)]
    assert keep.hours(1)(history) == {3, 7, 11, 15}
    assert keep.days(1)(history) == {15}
    thinned = [c for c in history if c.step in keep.hours(1)(history)]
    assert keep.hours(1)(thinned) == {3, 7, 11, 15}


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(allow_nan=True)), unique_by=lambda x: x[0]), st.integers(1, 5))
def test_union_keeps_what_either_keeps(pairs: list[tuple[int, float]], n: int) -> None:
    """``a | b`` is the union, and every rule keeps only what exists."""
    history = [at(step, loss=loss, hours=step) for step, loss in pairs]
    a, b = keep.last(n), keep.best("loss", n)
    assert (a | b)(history) == a(history) | b(history)
    assert (a | b | keep.hours(3))(history) <= {c.step for c in history}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: keep.last(0),
        lambda: keep.last(True),
        lambda: keep.best("loss", 0),
        lambda: keep.best("loss", 1, mode="least"),  # type: ignore[arg-type]
        lambda: keep.every(-1),
        lambda: keep.hours(0),
        lambda: keep.days(math.nan),
    ],
)
def test_nonsense_is_refused(wrong: object) -> None:
    """A rule that makes no sense is an error when it is made, not when something was deleted."""
    with pytest.raises(ValueError):
        wrong()  # type: ignore[operator]
