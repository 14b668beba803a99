"""Boxes make up a whole: compared with counting every element."""

from __future__ import annotations

import random
from itertools import product

import pytest

from ckptman.format.tiling import Box, tiles


def counted(boxes: list[Box], whole: tuple[int, ...]) -> bool:
    """The definition itself."""
    return all(
        sum(all(o <= p < o + n for o, n, p in zip(offset, shape, point, strict=True)) for offset, shape in boxes) == 1
        for point in product(*map(range, whole))
    )


def cut(generator: random.Random, box: Box, times: int) -> list[Box]:
    """Cut a box at random places into up to ``times + 1`` boxes."""
    boxes = [box]
    for _ in range(times):
        offset, shape = boxes.pop(generator.randrange(len(boxes)))
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        if not axes:
            boxes.append((offset, shape))
            continue
        axis = generator.choice(axes)
        at = generator.randrange(1, shape[axis])
        boxes.append((offset, (*shape[:axis], at, *shape[axis + 1 :])))
        later = (*offset[:axis], offset[axis] + at, *offset[axis + 1 :])
        boxes.append((later, (*shape[:axis], shape[axis] - at, *shape[axis + 1 :])))
    generator.shuffle(boxes)
    return boxes


def test_it_agrees_with_counting() -> None:
    """3,000 random cuts of 1 to 4 dimensions, half of them spoiled by moving or resizing one box."""
    generator = random.Random(7)
    verdicts = {True: 0, False: 0}
    for turn in range(3000):
        whole = tuple(generator.randint(1, 5) for _ in range(generator.randint(1, 4)))
        boxes = cut(generator, ((0,) * len(whole), whole), generator.randint(1, 6))
        if turn % 2:
            index, axis = generator.randrange(len(boxes)), generator.randrange(len(whole))
            offset, shape = boxes[index]
            size = generator.randint(1, whole[axis])
            moved = (*offset[:axis], generator.randint(0, whole[axis] - size), *offset[axis + 1 :])
            boxes[index] = (moved, (*shape[:axis], size, *shape[axis + 1 :]))
        verdict = tiles(boxes, whole)
        assert verdict == counted(boxes, whole), (boxes, whole)
        verdicts[verdict] += 1
    assert verdicts[True] > 1500
    assert verdicts[False] > 700


def test_same_volume_is_not_enough() -> None:
    """An overlap that a gap of the same size makes up for is seen, along one axis and along two."""
    assert not tiles([((0,), (2,)), ((1,), (2,))], (4,))
    assert not tiles([((0, 0), (2, 1)), ((0, 0), (1, 2))], (2, 2))


def test_a_thousand_ranks_take_no_time() -> None:
    """4,096 boxes in a grid: linear, so that a hostile manifest cannot stall a reader."""
    boxes = [((i, j), (1, 1)) for i in range(64) for j in range(64)]
    assert tiles(boxes, (64, 64))
    assert not tiles([*boxes[:-1], boxes[0]], (64, 64))


def test_too_many_dimensions_are_refused() -> None:
    """Corners grow as 2**dimensions: nine are refused, eight are judged."""
    for ndim in (8, 9):
        whole = (2,) * ndim
        boxes = [(corner, (1,) * ndim) for corner in product((0, 1), repeat=ndim)]
        if ndim == 8:
            assert tiles(boxes, whole)
        else:
            with pytest.raises(ValueError, match="9 dimensions"):
                tiles(boxes, whole)
