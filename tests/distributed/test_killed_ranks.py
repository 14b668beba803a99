"""A rank that is killed in each phase of a save: the others say what happened, soon, and never claim a commit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deadly_storage import Deadly, die
from fleet import run

from ckptman import CheckpointManager, CkptmanError
from ckptman.coordinator import TorchCoordinator
from ckptman.events import Event

SILENCE_S = 2.0


class Staging:
    """A component that kills its process while it is captured."""

    is_deadly = False

    def state_dict(self) -> dict[str, int]:
        if self.is_deadly:
            die()
        return {"x": 1}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def _save(rank: int, root: str, victim: int, moment: str) -> dict[str, Any]:
    storage, staging = Deadly(root), Staging()
    state = {"w": torch.full((1000,), float(rank)), "staging": staging}
    found: dict[str, Any] = {}
    began = time.monotonic()

    def watch(event: Event) -> None:
        found.setdefault("events", []).append(type(event).__name__)

    with CheckpointManager(storage, state, coordinator=TorchCoordinator(silence_s=SILENCE_S), hooks=[watch]) as manager:
        manager.save(1, block=True)
        found["events"] = []
        if rank == victim:
            storage.moment, staging.is_deadly = moment, moment == "staging"
        began = time.monotonic()
        try:
            found["saved"] = manager.save(2, block=True).step
        except CkptmanError as error:
            found["error"] = [type(error).__name__, str(error)]
        found["seconds"] = time.monotonic() - began
    found["closed after"] = time.monotonic() - began
    return found


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        (2, "staging"),
        (2, "writing"),
        (2, "reporting"),
        (0, "staging"),
        (0, "writing"),
        (0, "manifest"),
        (0, "committing"),
        (0, "committed"),
    ],
)
@pytest.mark.filterwarnings("ignore:restored with strict=False")
def test_a_killed_rank_is_named_by_all_others(tmp_path: Path, victim: int, moment: str) -> None:
    root = tmp_path / "root"
    found = run(tmp_path, 3, _save, str(root), victim, moment)
    assert [one is None for one in found] == [rank == victim for rank in range(3)]
    left = [one for one in found if one is not None]
    with CheckpointManager(root) as manager:
        steps = [checkpoint.step for checkpoint in manager.checkpoints()]
    if moment == "committed":
        assert steps == [1, 2]
        assert [one["saved"] for one in left] == [2, 2]
        assert ["Committed" in one["events"] for one in left] == [True, True]
    else:
        assert steps == [1]
        assert left[0]["error"] == left[1]["error"]
        kind, text = left[0]["error"]
        assert kind == "SaveFailed"
        assert f"rank {victim} (host" in text
        assert not any("Committed" in one["events"] for one in left)
    assert max(one["seconds"] for one in left) < SILENCE_S + 10
    assert max(one["closed after"] for one in left) < SILENCE_S + 20
    with CheckpointManager(root, {"w": torch.zeros(1000), "staging": Staging()}, rng=False) as manager:
        manager.restore(strict=False)
        manager.save(3, block=True)
    assert not [path for path in root.glob("step-000000000002.*") if moment != "committed"], "garbage was swept"
