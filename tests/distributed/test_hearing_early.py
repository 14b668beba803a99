"""A rank that fails, or dies, is heard by the others while they write for long: they break off their parts."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deadly_storage import die
from fleet import run

from ckptman import CheckpointManager, CkptmanError
from ckptman.coordinator import FilesCoordinator, TorchCoordinator
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import Fault, FaultySystem

SILENCE_S = 2.0
FILES = 60
PAUSE_S = 0.25
TO_THE_END_S = FILES * PAUSE_S
"""How long the others would write."""


class Slow(LocalStorage):
    """A disk that takes its time for every new file once ``is_slow``; on the guilty rank something else happens."""

    def __init__(self, root: str) -> None:
        self.is_slow = False
        self.moment = "never"
        self.opened = 0
        super().__init__(root, system=FaultySystem(Fault(at=1, name="open_new", lasting=True, strike=self._open)))

    def _open(self) -> None:
        if not self.is_slow:
            return
        self.opened += 1
        if self.moment == "reporting":
            return  # it is long ready when the others have written a few
        time.sleep(PAUSE_S)
        if self.moment == "killed" and self.opened == 3:
            die()
        if self.moment == "writing" and self.opened == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def persist(self, folders: Any) -> None:
        if self.is_slow and self.moment == "reporting":
            raise OSError(errno.EIO, "the folder is gone")
        super().persist(folders)


def _no_memory(*_: object, **__: object) -> Any:
    raise MemoryError("not a byte left")


def _fail_late(rank: int, root: str, guilty: int, moment: str, through_files: bool) -> dict[str, Any]:
    state = {f"part{number}": torch.full((4,), float(rank)) for number in range(FILES)}
    storage = Slow(root)
    ranks = (
        FilesCoordinator(root, rank=rank, world_size=3, job="a")
        if through_files
        else TorchCoordinator(silence_s=SILENCE_S)
    )
    found: dict[str, Any] = {}
    with CheckpointManager(storage, state, coordinator=ranks) as manager:
        manager.save(1, block=True)
        storage.is_slow = True
        if rank == guilty:
            storage.moment = moment
        borrow = manager._engine._borrow
        if (rank, moment) == (guilty, "staging"):
            manager._engine._borrow = _no_memory
        began = time.monotonic()
        try:
            manager.save(2).result()
        except CkptmanError as error:
            found["error"] = [type(error).__name__, str(error)]
        found["seconds"] = time.monotonic() - began
        storage.is_slow = False
        manager._engine._borrow = borrow
        if moment != "killed":
            found["again"] = manager.save(3, block=True).step
    found["closed after"] = time.monotonic() - began
    return found


@pytest.mark.parametrize(
    ("guilty", "moment", "through_files"),
    [
        (2, "staging", False),
        (2, "writing", False),
        (0, "writing", False),
        (1, "reporting", False),
        (2, "killed", False),
        (0, "killed", False),
        (1, "writing", True),
    ],
)
def test_a_failure_is_heard_by_ranks_that_have_much_to_write(
    tmp_path: Path, guilty: int, moment: str, through_files: bool
) -> None:
    """The same error on all, in a fraction of what writing to the end would take; and the next save works."""
    root = tmp_path / "root"
    found = [one for one in run(tmp_path, 3, _fail_late, str(root), guilty, moment, through_files) if one is not None]
    assert len(found) == (2 if moment == "killed" else 3)
    assert all(one["error"] == found[0]["error"] for one in found)
    kind, text = found[0]["error"]
    assert kind == "SaveFailed"
    assert text.startswith(("saving step 2 failed, nothing was committed", "staging failed, nothing was committed"))
    assert f"rank {guilty} " in text
    cause = {"staging": "not a byte", "writing": "No space left", "reporting": "is gone", "killed": "is silent"}[moment]
    assert cause in text
    assert max(one["seconds"] for one in found) < TO_THE_END_S / 2
    assert max(one["closed after"] for one in found) < TO_THE_END_S
    with CheckpointManager(root) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == ([1] if moment == "killed" else [1, 3])
