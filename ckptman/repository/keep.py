"""
Retention: which checkpoints to keep. A rule is a pure function of the history.

    keep.last(3) | keep.best("loss", 2) | keep.every(10_000)

keeps what any of them keeps. Whatever the rule says, the newest checkpoint and tagged ones are kept, and a
checkpoint is dropped only by the very commit that adds a newer one: retention never leaves less than it found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ckptman.types import Checkpoint

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Keep:
    """A retention rule: history, oldest commit first → the steps to keep. Pure; never sees a storage."""

    rule: Callable[[Sequence[Checkpoint]], frozenset[int]]

    def __call__(self, history: Sequence[Checkpoint]) -> frozenset[int]:
        """The steps of *history* that the rule keeps."""
        return self.rule(history)

    def __or__(self, other: Keep) -> Keep:
        """Keep what either keeps."""
        return Keep(lambda history: self(history) | other(history))


def _steps(checkpoints: Iterable[Checkpoint]) -> frozenset[int]:
    return frozenset(checkpoint.step for checkpoint in checkpoints)


everything = Keep(_steps)
"""Delete nothing. The default."""


def last(n: int) -> Keep:
    """Keep the *n* most recently committed (n >= 1)."""
    _at_least_one("last", n)
    return Keep(lambda history: _steps(history[-n:]))


def best(metric: str, n: int = 1, mode: Mode = "min") -> Keep:
    """
    Keep the *n* best by *metric* (n >= 1); ``mode`` says whether less or more is better.

    Checkpoints without the metric, or where it is NaN, are never among the best. Of equals the later one wins.
    """
    _at_least_one("best", n)
    _check_mode(mode)
    return Keep(lambda history: _steps(ranked(history, metric, mode)[:n]))


def every(steps: int) -> Keep:
    """Keep those whose step is a multiple of *steps* (>= 1)."""
    _at_least_one("every", steps)
    return Keep(lambda history: _steps(c for c in history if c.step % steps == 0))


def hours(h: float) -> Keep:
    """Thin out by age: of every *h* hours (> 0) of UTC time that have a checkpoint, keep the last committed one."""
    if not h > 0 or not math.isfinite(h):
        raise ValueError(f"keep.hours and keep.days need a number above 0, got {h}")

    def rule(history: Sequence[Checkpoint]) -> frozenset[int]:
        return frozenset({c.created_at.timestamp() // (h * 3600): c.step for c in history}.values())

    return Keep(rule)


def days(d: float) -> Keep:
    """Thin out by age: of every *d* days (> 0) of UTC time that have a checkpoint, keep the last committed one."""
    return hours(d * 24)


def ranked(history: Sequence[Checkpoint], metric: str, mode: Mode) -> list[Checkpoint]:
    """Those of *history* that have a number for *metric*, best first; of equals the later commit first."""
    scored = [c for c in reversed(history) if not math.isnan(c.metrics.get(metric, math.nan))]
    return sorted(scored, key=lambda c: c.metrics[metric] if mode == "min" else -c.metrics[metric])


def _at_least_one(rule: str, n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"keep.{rule} needs a whole number of at least 1, got {n!r}")


def _check_mode(mode: str) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
