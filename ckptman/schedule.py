"""When to save."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int, float], bool]
"""``(step, seconds since the last save) -> whether to save now``."""


@dataclass(frozen=True, slots=True)
class Every:
    """
    Save every so many steps, or when so much time has passed since the last save, whichever comes first.

    ``Every(steps=500)`` saves at steps 500, 1000, …: at multiples, so that a resumed run keeps the same rhythm.
    Time counts from the last save of this manager, or from its construction.

    Raises:
        ValueError: Nothing was given, or something that is not above 0.
    """

    steps: int | None = None
    minutes: float | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("steps", "minutes", "hours")}
        if all(value is None for value in given.values()):
            raise ValueError("Every needs steps=…, minutes=… or hours=…")
        for name, value in given.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Every({name}=…) must be above 0, got {value!r}")
        if self.steps is not None and (isinstance(self.steps, bool) or not isinstance(self.steps, int)):
            raise ValueError(f"Every(steps=…) must be a whole number, got {self.steps!r}")

    def __call__(self, step: int, seconds_since_last: float) -> bool:
        """Whether to save now."""
        if self.steps is not None and step > 0 and step % self.steps == 0:
            return True
        limits = [limit * unit for limit, unit in ((self.minutes, 60), (self.hours, 3600)) if limit is not None]
        return bool(limits) and seconds_since_last >= min(limits)
