"""With the constants that users have: who failed is known on all ranks within 30 s, and the block is left within 60."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deadly_storage import Deadly
from fleet import run

from ckptman import CheckpointManager, CkptmanError, FilesCoordinator
from ckptman.coordination.life import LOOK_S, SILENCE_OF_FILES_S, SILENCE_S
from ckptman.errors import StorageError
from ckptman.pipeline.loss import PATIENCE_S, SUCCESSION_S
from ckptman.pipeline.ranks import BREAK_OFF_S

WORLD_SIZE = 4
TOLD_S = 30.0
LEFT_S = 60.0


class Full(Deadly):
    """A disk that is full once ``is_full``."""

    is_full = False

    def open_new(self, key: str) -> Any:
        if self.is_full and "safetensors" in key:
            raise StorageError(f"creating {key!r}: No space left on device", key=key)
        return super().open_new(key)


class Raising:
    """A component that raises while it is captured, once ``is_broken``."""

    is_broken = False

    def state_dict(self) -> dict[str, int]:
        if self.is_broken:
            raise RuntimeError("a component of the user's own")
        return {"x": 1}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def _fail(rank: int, root: str, victim: int, end: str, through_files: bool) -> dict[str, Any]:
    storage, raising = Full(root), Raising()
    ranks = FilesCoordinator(root, rank=rank, world_size=WORLD_SIZE, job="a") if through_files else None
    found: dict[str, Any] = {}
    began = 0.0
    state = {"w": torch.full((1000,), float(rank)), "raising": raising}
    with CheckpointManager(storage, state, coordinator=ranks, rng=False) as manager:
        manager.save(1, block=True)
        if rank == victim:
            storage.is_full, raising.is_broken = end == "full", end == "raises"
            storage.moment = end
        began = time.monotonic()
        try:
            manager.save(2).result()
        except CkptmanError as error:
            found["error"] = [type(error).__name__, str(error)]
        found["told after"] = time.monotonic() - began
        storage.is_full = raising.is_broken = False
        if end in ("full", "raises"):
            found["again"] = manager.save(3, block=True).result().step
            began = time.monotonic()
    found["left after"] = time.monotonic() - began
    return found


def _check(found: list[dict[str, Any] | None], victim: int, cause: str) -> None:
    left = [one for one in found if one is not None]
    assert all(one["error"] == left[0]["error"] for one in left)
    kind, text = left[0]["error"]
    assert kind == "SaveFailed"
    assert f"rank {victim} " in text
    assert "host" in text
    assert cause in text
    print(f"told after {max(one['told after'] for one in left):.1f} s", end=", ")
    print(f"left after {max(one['left after'] for one in left):.1f} s")


@pytest.mark.parametrize(("victim", "end", "cause"), [(1, "full", "No space left"), (3, "raises", "a component")])
def test_who_lives_on_is_heard_at_once_and_saves_again(tmp_path: Path, victim: int, end: str, cause: str) -> None:
    found = run(tmp_path, WORLD_SIZE, _fail, str(tmp_path / "root"), victim, end, False)
    _check(found, victim, cause)
    assert all(one["again"] == 3 for one in found)
    assert max(one["told after"] for one in found) < 10
    assert max(one["left after"] for one in found) < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "end", "through_files"),
    [(2, "writing", False), (0, "committing", False), (1, "writing", True), (0, "writing", True)],
)
def test_a_killed_rank_is_named_in_time(tmp_path: Path, victim: int, end: str, through_files: bool) -> None:
    root = tmp_path / "root"
    found = run(tmp_path, WORLD_SIZE, _fail, str(root), victim, end, through_files, group=not through_files)
    _check(found, victim, "is silent")
    left = [one for one in found if one is not None]
    assert len(left) == WORLD_SIZE - 1
    assert max(one["told after"] for one in left) < TOLD_S
    assert max(one["left after"] for one in left) < LEFT_S
    with CheckpointManager(root) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1]


@pytest.mark.parametrize("silence_s", [SILENCE_S, SILENCE_OF_FILES_S])
def test_the_constants_keep_the_promise(silence_s: float) -> None:
    """
    The test above with the sum of what it waits for, which the default run has no time for.

    The last beat is heard a look late, the silence is seen a look late, and told to the others a look later.
    """
    assert SUCCESSION_S < PATIENCE_S, "who does not take over still looks when the one who does has done it"
    assert BREAK_OFF_S < PATIENCE_S, "and when rank 0 has left its own hanging storage alone"
    assert silence_s + 3 * LOOK_S + PATIENCE_S < TOLD_S
