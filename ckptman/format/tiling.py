"""Whether boxes make up a whole: every element of a tensor in exactly one of its chunks. Exact, in linear time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import product

MAX_SPLIT_NDIM = 8
"""A tensor may be cut along so many of its dimensions, at most."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The (offset, shape) of a part of a tensor."""


def tiles(boxes: Sequence[Box], whole: tuple[int, ...]) -> bool:
    """
    Whether *boxes*, none of them empty and none beyond it, cover the box of shape *whole* exactly once.

    Raises:
        ValueError: They cut it along more than `MAX_SPLIT_NDIM` dimensions, which would take too long to judge.
    """
    axes = [axis for axis, size in enumerate(whole) if any(shape[axis] != size for _, shape in boxes)]
    if len(axes) > MAX_SPLIT_NDIM:
        raise ValueError(f"it is cut along {len(axes)} dimensions, at most {MAX_SPLIT_NDIM} may be")
    if len(axes) == 1:
        return _follow_one_another(boxes, axes[0], whole[axes[0]])
    return _corners_cancel(boxes, axes, whole)


def _follow_one_another(boxes: Sequence[Box], axis: int, size: int) -> bool:
    """The common case, cut along one *axis*: each box begins where another one ends."""
    stop = 0
    for start, length in sorted([(offset[axis], shape[axis]) for offset, shape in boxes]):
        if start != stop:
            return False
        stop += length
    return stop == size


def _corners_cancel(boxes: Sequence[Box], axes: list[int], whole: tuple[int, ...]) -> bool:
    """
    The general case: boxes add up to the whole if and only if their corners do.

    Each corner counts with the sign (-1)**(number of its upper ends). So counted, the corners are the mixed
    derivative of the function that says how many boxes hold an element, and that determines it.
    """
    corners: defaultdict[tuple[int, ...], int] = defaultdict(int)
    for weight, (offset, shape) in ((-1, ((0,) * len(whole), whole)), *((1, box) for box in boxes)):
        spans = [((offset[axis], 1), (offset[axis] + shape[axis], -1)) for axis in axes]
        for corner in product(*spans):
            corners[tuple(place for place, _ in corner)] += weight * math.prod(sign for _, sign in corner)
    return not any(corners.values())
