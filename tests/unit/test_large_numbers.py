"""States of very many tensors, and roots of very many checkpoints: what holds for three holds for tens of thousands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch

from ckptman import CheckpointManager
from ckptman.format.catalog import Entry
from ckptman.repository.ownership import take
from ckptman.storage.local import LocalStorage

TENSORS = 50_000
CHECKPOINTS = 10_000


def test_fifty_thousand_tensors_come_back(tmp_path: Path) -> None:
    """Each with its own value."""
    values = torch.arange(float(TENSORS))
    tensors = {f"t{index}": value.clone() for index, value in enumerate(values.split(1))}
    with CheckpointManager(tmp_path, {"tensors": tensors}, rng=False) as manager:
        manager.save(1, block=True)
        found = {name: torch.zeros(1) for name in tensors}
    with CheckpointManager(tmp_path, {"tensors": found}, rng=False) as manager:
        checkpoint = manager.restore()
        assert checkpoint is not None
        assert checkpoint.nbytes == 4 * TENSORS
    assert torch.equal(torch.cat(list(found.values())), values)


def _entry(step: int) -> Entry:
    return Entry(
        step=step,
        attempt=f"step-{step:012d}.w0001.{step:08x}",
        manifest=f"{step:064x}",
        after=step,
        created_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=step),
        nbytes=1,
        new_nbytes=1,
        world_size=1,
        components=("x",),
        metrics={"loss": abs(step - 777.0)},
    )


def test_ten_thousand_checkpoints_are_listed_ranked_and_added_to(tmp_path: Path) -> None:
    owner = take(LocalStorage(tmp_path), timeout_s=0)
    owner.commit(lambda _: [_entry(step) for step in range(1, CHECKPOINTS + 1)], "many")
    owner.release()
    x = torch.ones(1)
    with CheckpointManager(tmp_path, {"x": x}, rng=False) as manager:
        assert [one.step for one in manager.checkpoints()] == list(range(1, CHECKPOINTS + 1))
        best = manager.best("loss")
        assert best is not None
        assert best.step == 777
        manager.save(CHECKPOINTS + 1, block=True)
        manager.delete(777)
        latest = manager.latest()
        assert latest is not None
        assert latest.step == CHECKPOINTS + 1
        assert len(manager.checkpoints()) == CHECKPOINTS
        x.zero_()
        manager.restore()
    assert x.item() == 1
