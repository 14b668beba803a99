"""Where warnings point at."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from ckptman import CheckpointManager


def test_a_warning_points_at_the_line_that_called_ckptman(tmp_path: Path) -> None:
    """However many of our own calls lie between: here a restore that lacks a component, and one past damage."""
    with CheckpointManager(tmp_path, {"a": torch.zeros(2)}) as manager:
        manager.save(1, block=True)
        manager.save(2, block=True)
    next(tmp_path.glob("step-*2.*/a.safetensors")).write_bytes(b"")
    reader = CheckpointManager(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reader.restore(strict=False)
    reader.close()
    assert len(caught) >= 2
    assert {one.filename for one in caught} == {__file__}
