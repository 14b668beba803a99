"""Numbers for people. A table or a plot has one unit per column: that of its middle value."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.figures import Median


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A unit's name and its size in seconds or bytes."""

    name: str
    size: float

    def number(self, value: float) -> str:
        """Three significant digits, without the unit."""
        scaled = value / self.size
        digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
        return f"{scaled:.{digits}f}"

    def text(self, value: float) -> str:
        return f"{self.number(value)} {self.name}"

    def spread(self, median: Median) -> str:
        return f"{self.number(median.median)} ({self.number(median.low)} – {self.number(median.high)})"


TIMES = (Unit(name="s", size=1), Unit(name="ms", size=1e-3), Unit(name="µs", size=1e-6))
SIZES = (Unit(name="MiB", size=1 << 20), Unit(name="KiB", size=1 << 10))


def unit_for(field: str, values: Iterable[float]) -> Unit:
    """The largest unit in which the middle one of *values* is one or more; the smallest if there is none."""
    units = SIZES if field.endswith("nbytes") else TIMES
    middle = statistics.median([abs(value) for value in values] or [0])
    return next((unit for unit in units if middle >= unit.size), units[-1])
