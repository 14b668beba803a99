"""What a sample of a parameter sees of a change: both ends, every 64th of it, and in time every element."""

from __future__ import annotations

import pytest
import torch

from ckptman.format.digest import Hasher
from ckptman.pipeline.sharing import SAMPLE_NBYTES, SPREAD, _add_sample

COUNT = 100_003


def sample(tensor: torch.Tensor, step: int) -> str:
    hasher = Hasher()
    _add_sample(hasher, tensor, step)
    return hasher.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int8])
def test_what_fills_a_64th_of_a_tensor_is_seen_at_every_step(dtype: torch.dtype) -> None:
    """Wherever it lies; and what did not change is the same."""
    plain = (torch.arange(COUNT) % 100).to(dtype)
    length = COUNT // SPREAD
    for step in (0, 1, 2, 500, 1000, 10**12):
        assert sample(plain, step) == sample(plain.clone(), step)
        for first in range(0, COUNT - length, 7_777):
            changed = plain.clone()
            changed[first : first + length] += 1
            assert sample(changed, step) != sample(plain, step), (step, first)


@pytest.mark.parametrize("every", [1, 500, 1024])
def test_a_single_element_is_seen_at_one_of_some_steps(every: int) -> None:
    """Whatever the distance of the saves: about one in a stride of them sees it."""
    plain = torch.zeros(64 * 200)
    count = SAMPLE_NBYTES // 4
    for place in (count, 5_001, len(plain) - count - 1):
        changed = plain.clone()
        changed[place] = 1
        seen = [sample(changed, step) != sample(plain, step) for step in range(0, 400 * every, every)]
        assert 1 <= sum(seen) <= 6
    changed[-1] = changed[0] = 1
    assert sample(changed, 0) != sample(plain, 0)
