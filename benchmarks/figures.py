"""From samples to verdicts: medians, spread, ratios pair by pair. Pure functions of numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Fields = Mapping[str, float]
"""What one contestant measured in one repetition."""
Repetition = Mapping[str, Fields]
"""Contestant → what it measured."""
Kind = Literal["ratio", "above", "absolute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Median:
    """A median with its spread."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """
    What one figure of one contestant shall be.

    Attributes:
        label: For people.
        contestant, field: Where the figure is.
        kind: ``ratio`` to the floor, ``above`` the floor (a difference), or ``absolute``.
        limit: At most this, in the figure's unit or as a ratio.
        floor: The contestants that know the floor; the lowest of a repetition counts.
        floor_field: Their field.
        scales: Whether a smaller run can judge it; otherwise only the full one does.
    """

    label: str
    contestant: str
    field: str
    kind: Kind
    limit: float
    floor: tuple[str, ...] = ()
    floor_field: str = "seconds"
    scales: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """
    How a target fared.

    Attributes:
        figure, floor: The medians of the figure and of its floor (None if there is no floor), in the field's unit.
        compared: What is held against ``limit``: a ratio, a difference or the figure itself.
        is_met: None if this run cannot judge it.
        missed_by: How far ``compared`` lies above ``limit``, as a share of ``limit``; 0 if the target is met.
    """

    label: str
    kind: Kind
    limit: float
    figure: Median
    floor: Median | None
    compared: Median
    is_met: bool | None
    missed_by: float


def summarise(values: Sequence[float]) -> Median:
    """Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values: nothing was measured")
    return Median(median=statistics.median(values), low=min(values), high=max(values), count=len(values))


def values_of(repetitions: Sequence[Repetition], contestant: str, field: str) -> list[float]:
    """The figure in each repetition that has it."""
    fields = (repetition.get(contestant, {}) for repetition in repetitions)
    return [measured[field] for measured in fields if field in measured]


def lowest(repetition: Repetition, contestants: Sequence[str], field: str) -> float | None:
    """The floor of one repetition; None if nobody measured it."""
    found = [value for contestant in contestants for value in values_of([repetition], contestant, field)]
    return min(found, default=None)


def pairs(
    repetitions: Sequence[Repetition], contestant: str, field: str, floor: Sequence[str], floor_field: str
) -> list[tuple[float, float]]:
    """(figure, floor) of each repetition that has both: what ran minutes apart is never compared."""
    found = []
    for repetition in repetitions:
        figure = repetition.get(contestant, {}).get(field)
        below = lowest(repetition, floor, floor_field)
        if figure is not None and below is not None:
            found.append((figure, below))
    return found


def ratios(
    repetitions: Sequence[Repetition], contestant: str, field: str, floor: Sequence[str], floor_field: str
) -> list[float]:
    """Figure over floor, pair by pair."""
    return [figure / below for figure, below in pairs(repetitions, contestant, field, floor, floor_field)]


def judge(target: Target, repetitions: Sequence[Repetition], *, is_full: bool) -> Verdict | None:
    """How *target* fared; None if nothing of it was measured."""
    figures = values_of(repetitions, target.contestant, target.field)
    if not figures:
        return None
    both = pairs(repetitions, target.contestant, target.field, target.floor, target.floor_field) if target.floor else []
    if target.floor and not both:
        return None
    compared = summarise(_compared(target, figures, both))
    missed_by = max(0.0, compared.median / target.limit - 1)
    return Verdict(
        label=target.label,
        kind=target.kind,
        limit=target.limit,
        figure=summarise(figures),
        floor=summarise([below for _, below in both]) if both else None,
        compared=compared,
        is_met=missed_by == 0 if is_full or target.scales else None,
        missed_by=missed_by,
    )


def _compared(target: Target, figures: Sequence[float], both: Sequence[tuple[float, float]]) -> list[float]:
    match target.kind:
        case "ratio":
            return [figure / below for figure, below in both]
        case "above":
            return [figure - below for figure, below in both]
        case "absolute":
            return list(figures)
