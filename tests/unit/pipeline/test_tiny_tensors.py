"""Very many tiny tensors, which are copied, compared and filled by their addresses."""

from __future__ import annotations

from pathlib import Path

import torch

from ckptman import CheckpointManager

COUNT = 3000
SHAPES = ((256,), (16, 16), (), (2, 3, 4), (0, 4), (1,))


def of_many_shapes(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {f"t{index}": torch.randn(SHAPES[index % len(SHAPES)], generator=random) for index in range(600)}


def test_tensors_of_all_shapes_come_back(tmp_path: Path) -> None:
    """With dimensions or without, empty or not, some above the size up to which one thread copies."""
    tensors = of_many_shapes(0) | {"large": torch.randn(600, 600), "after": torch.randn(3, 3)}
    with CheckpointManager(tmp_path, {"tensors": tensors}) as manager:
        manager.save(1, block=True)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with CheckpointManager(tmp_path, {"tensors": found}) as manager:
        assert manager.restore() is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_only_unchanged_ones_are_borrowed(tmp_path: Path) -> None:
    """A third changed in one bit each: these are written, the others are not, and all come back as they were."""
    random = torch.Generator().manual_seed(0)
    tensors = {f"t{index}": torch.randn(256, generator=random) for index in range(COUNT)}
    with CheckpointManager(tmp_path, {"tensors": tensors}, rng=False) as manager:
        manager.save(1, block=True)
        for index in range(0, COUNT, 3):
            tensors[f"t{index}"].view(torch.int32)[index % 256] ^= 1
        assert manager.save(2, block=True).result().new_nbytes == COUNT // 3 * 1024
    found = {name: torch.zeros(256) for name in tensors}
    with CheckpointManager(tmp_path, {"tensors": found}, rng=False) as manager:
        assert manager.restore(2) is not None
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
