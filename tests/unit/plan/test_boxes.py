"""Boxes: intersections, runs and bands say the same as NumPy's indexing does."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptman.format.tiling import Box
from ckptman.plan.boxes import bands, contiguous, intersect, slices, within

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return offset, tuple(draw(st.integers(1, size - start)) for start, size in zip(offset, shape, strict=True))


def _elements(shape: tuple[int, ...], box: Box) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)[slices(box)]


@given(st.data())
def test_an_intersection_is_what_both_have(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = set(_elements(shape, one).flat) & set(_elements(shape, other).flat)
    shared = intersect(one, other)
    assert common == (set() if shared is None else set(_elements(shape, shared).flat))
    if shared is not None:
        part = np.arange(math.prod(shape)).reshape(shape)[slices(one)][slices(within(shared, one))]
        assert np.array_equal(part, _elements(shape, shared))


def test_boxes_without_dimensions_meet() -> None:
    assert intersect(((), ()), ((), ())) == ((), ())


@given(st.data())
def test_a_run_is_found_exactly_where_the_elements_lie_together(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    part = data.draw(boxes(shape))
    elements = _elements(shape, part).ravel()
    together = bool((np.diff(elements) == 1).all())
    assert contiguous(part, shape) == ((elements[0], elements[-1] + 1) if together else None)


@given(st.data(), st.integers(1, 200))
def test_bands_give_the_part_back(data: st.DataObject, most: int) -> None:
    """And no row is larger than allowed."""
    shape = data.draw(shapes)
    part = data.draw(boxes(shape))
    flat = np.arange(math.prod(shape))
    copy = np.full(part[1], -1)
    last = -1
    for band in bands(part, shape, most):
        size = math.prod(band.row)
        assert size <= most or not band.row
        assert band.start >= last, "in the order of the rows"
        last = band.start + band.rows * size
        rows = flat[band.start : last].reshape(band.rows, *band.row)
        copy[band.at[:-1]][: band.rows] = rows[(slice(None), *slices(band.inner))]
    assert np.array_equal(copy, _elements(shape, part))
