"""What an examination finds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "bad", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """
    One thing that was looked at. ``what`` is a sentence for people, ``figures`` are numbers for programs.

    ``unknown`` is neither good nor bad: it could not be measured here, or has no bounds.
    """

    name: str
    verdict: Verdict
    what: str
    figures: Mapping[str, float] = field(default_factory=dict)


def median_s(times: int, act: Callable[[int], object]) -> float:
    """The median of the seconds that *act* takes, called with 0, 1, … *times* - 1."""
    taken = []
    for number in range(times):
        began = time.perf_counter()
        act(number)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def duration(seconds: float) -> str:
    """``0.0123`` → ``12.3 ms``."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
