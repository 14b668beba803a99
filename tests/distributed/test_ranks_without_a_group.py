"""Processes that share nothing but the root: one comes late, one never, one is killed in the middle of a save."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deadly_storage import Deadly
from fleet import run

from ckptman import CheckpointManager, CkptmanError, FilesCoordinator, RankLost

SIZE = 3
SILENCE_S = 2.0


def _without_one(rank: int, root: str) -> list[Any]:
    try:
        FilesCoordinator(root, rank=rank, world_size=SIZE, job="a", timeout_s=1.0)
    except RankLost as error:
        return [str(error), error.ranks]
    raise AssertionError("nobody was missed")


def _with_a_late_one(rank: int, root: str, late: int) -> dict[str, Any]:
    assert not dist.is_initialized()
    if rank == late:
        time.sleep(0.5)
    state = {"mine": torch.full((1000,), float(rank)), "shared": torch.arange(10.0)}
    storage = Deadly(root)
    ranks = FilesCoordinator(root, rank=rank, world_size=SIZE, job="a", silence_s=SILENCE_S)
    found: dict[str, Any] = {}
    with CheckpointManager(storage, state, coordinator=ranks) as manager:
        manager.save(1, block=True)
        for tensor in state.values():
            tensor.zero_()
        manager.restore()
        found["restored"] = [state["mine"].unique().tolist(), state["shared"].sum().item()]
        storage.moment = "writing" if rank == 1 else "never"
        state["mine"].add_(1)
        began = time.monotonic()
        try:
            manager.save(2).result()
        except CkptmanError as error:
            found["error"] = [type(error).__name__, str(error)]
        found["seconds"] = time.monotonic() - began
    return found


def test_a_missing_rank_is_named_a_late_one_is_waited_for_and_a_killed_one_costs_a_save(tmp_path: Path) -> None:
    """The same job tried again under the same name, with what the first try left in the root."""
    root = tmp_path / "root"
    zero, one = run(tmp_path, SIZE - 1, _without_one, str(root), group=False)
    assert zero[1] == [2]
    assert "these did not come" in zero[0]
    assert one[1] == [0]
    found = run(tmp_path, SIZE, _with_a_late_one, str(root), 0, group=False)
    assert found[1] is None, "it was killed"
    for rank in (0, 2):
        assert found[rank]["restored"] == [[rank], 45.0]
        assert found[rank]["error"] == found[0]["error"]
        assert found[rank]["seconds"] < SILENCE_S + 15
    kind, text = found[0]["error"]
    assert kind == "SaveFailed"
    assert "rank 1 (host" in text
    with CheckpointManager(root) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1]
