"""Ranges of elements as boxes: each element once, in its order, in as few boxes as there are ways to be cut."""

from __future__ import annotations

import pytest
import torch

from ckptman.state.flat import ranges


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (3, 1), (1, 4), (2, 3, 4), (3, 1, 2, 2)])
def test_every_range_of_a_tensor_is_its_boxes(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    count = whole.numel()
    tried = 0
    for start in range(count + 1):
        for stop in range(start, count + 1):
            held, found = whole.reshape(-1)[start:stop], list(ranges(shape, start, stop))
            ends = [end for *_, end in found]
            assert [at for _, _, at, _ in found] == [0, *ends][: len(found)]
            assert sum(end - at for _, _, at, end in found) == stop - start
            for offset, extent, at, end in found:
                index = tuple(slice(one, one + size) for one, size in zip(offset, extent, strict=True))
                assert torch.equal(held[at:end].view(extent), whole[index])
            assert len(found) <= max(1, 2 * len(shape) - 1)
            tried += 1
    assert tried == (count + 1) * (count + 2) // 2
