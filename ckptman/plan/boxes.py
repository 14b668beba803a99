"""
Hyper-rectangles: where they meet, and which bytes of a stored box a part of it is.

A box is an (offset, shape) inside a tensor. Whether boxes make up the whole is asked of `ckptman.format.tiling`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from ckptman.format.tiling import Box


def intersect(one: Box, other: Box) -> Box | None:
    """What the two boxes share; None if that is nothing. Two boxes without dimensions share their one element."""
    starts = tuple(map(max, one[0], other[0]))
    stops = tuple(min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True))
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None
    return starts, tuple(stop - start for start, stop in zip(starts, stops, strict=True))


def within(part: Box, whole: Box) -> Box:
    """*part*, which lies in *whole*, counted from the first corner of *whole*."""
    return tuple(a - b for a, b in zip(part[0], whole[0], strict=True)), part[1]


def slices(box: Box) -> tuple[slice, ...]:
    """How an array of the surrounding tensor is indexed to give *box*."""
    return tuple(slice(start, start + size) for start, size in zip(*box, strict=True))


def contiguous(part: Box, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """
    The (first, end) of the elements of *part* in a row-major tensor of *shape*; None where there are others between.

    *part* is not empty, and counted from the first corner of the tensor.
    """
    first = end = 0
    is_whole = True  # every dimension further in is taken whole
    stride = 1
    for start, size, whole in zip(reversed(part[0]), reversed(part[1]), reversed(shape), strict=True):
        if not is_whole and size > 1:
            return None
        first += start * stride
        end += (start + size - 1) * stride
        is_whole = is_whole and size == whole
        stride *= whole
    return first, end + 1


class Band(NamedTuple):
    """
    Whole rows of a row-major tensor, one behind the other, from which a part is to be taken.

    Attributes:
        start: The first element of the first row.
        rows: How many rows.
        row: The shape of one row.
        inner: What is taken of each row: the same for all of them.
        at: Where the first row belongs within the part: a place along each of its dimensions, up to that of the rows.
    """

    start: int
    rows: int
    row: tuple[int, ...]
    inner: Box
    at: tuple[int, ...]


def bands(part: Box, shape: tuple[int, ...], most: int) -> Iterator[Band]:
    """
    *part* of a row-major tensor of *shape* as bands whose rows have *most* elements or fewer, in the order of the rows.

    There are few of them: each but the last of a tensor's dimension spans more than *most* elements. *part* is counted
    from the first corner of the tensor, which has one dimension or more.
    """
    axis = len(shape) - 1
    while axis > 0 and math.prod(shape[axis:]) <= most:
        axis -= 1
    offset, size = part
    row, inner = shape[axis + 1 :], (offset[axis + 1 :], size[axis + 1 :])
    nelements = math.prod(row)
    for outer in product(*(range(n) for n in size[:axis])):
        index = 0
        for place, start, whole in zip(outer, offset[:axis], shape[:axis], strict=True):
            index = index * whole + start + place
        start = (index * shape[axis] + offset[axis]) * nelements
        yield Band(start, size[axis], row, inner, (*outer, 0))
