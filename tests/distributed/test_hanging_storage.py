"""A rank whose storage hangs in a call, while another fails or dies: nobody waits for it, nothing of it is reused."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from deadly_storage import die
from fleet import run

from ckptman import CheckpointManager, CkptmanError, Limits, SaveFailed
from ckptman.coordinator import TorchCoordinator
from ckptman.pipeline import ranks as pipeline_ranks
from ckptman.pipeline import together
from ckptman.pipeline.arena import SLOT_NBYTES
from ckptman.storage.local import LocalStorage
from ckptman.storage.system import System

SILENCE_S = 2.0
COUNT = (SLOT_NBYTES + (1 << 20)) // 4
"""Elements of a tensor that goes through two slots."""


class Hanging(System):
    """The next call named *hangs* returns only once ``go`` is set; or *fails* does something else."""

    def __init__(self) -> None:
        self.hangs = ""
        self.fails: Any = None
        self.go = threading.Event()
        self.kept_its_bytes = True

    def _hang(self, name: str, data: memoryview | None = None) -> None:
        if self.fails is not None:
            time.sleep(0.5)  # until the others are well under way
            self.fails()
        if self.hangs == name:
            self.hangs = ""
            before = hashlib.sha256(data or b"").digest()
            assert self.go.wait(90)
            self.kept_its_bytes = hashlib.sha256(data or b"").digest() == before

    def write(self, file: FileIO, data: memoryview) -> int:
        self._hang("write", data)
        return super().write(file, data)

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        self._hang("write", data)
        return super().write_direct(file, data)

    def fsync(self, file: FileIO) -> None:
        self._hang("fsync")
        super().fsync(file)


class Said(logging.Handler):
    """The warnings of this process; ``then`` is called after the first."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self.then: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        if self.then is not None:
            self.then()


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _parts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ckptman-part"]


def _save(rank: int, root: str, roles: tuple[int, int], call: str, end: str, block: bool) -> dict[str, Any]:
    pipeline_ranks.BREAK_OFF_S = 1.0  # rather than 5: for this process, a child
    failing, hanging = roles
    system, weights = Hanging(), torch.full((COUNT,), float(rank))
    found: dict[str, Any] = {}
    ranks = TorchCoordinator(silence_s=SILENCE_S)
    limits = Limits(host_nbytes=SLOT_NBYTES)  # the thread that hangs has the only slot
    storage = LocalStorage(root, system=system)
    with CheckpointManager(storage, {"w": weights}, coordinator=ranks, limits=limits, rng=False) as manager:
        manager.save(1, block=True)
        weights.add_(10)
        system.hangs = call if rank == hanging else ""
        system.fails = {"full": _full, "killed": die}[end] if rank == failing else None
        began = time.monotonic()
        try:
            manager.save(2, block=block).result()
        except CkptmanError as error:
            found["error"] = [type(error).__name__, str(error)]
        found["seconds"] = time.monotonic() - began
        found["hangs"] = len(_parts())
        if end == "full":
            system.fails = None
            weights.add_(10)
            found["again"] = manager.save(3, block=block).result().step
        system.go.set()
        for thread in _parts():
            thread.join(30)
        found["kept its bytes"] = system.kept_its_bytes
        if end == "full":
            weights.add_(10)
            manager.save(4, block=block).result()
            for step in (1, 3, 4):
                manager.restore(step)
                found[f"restored {step}"] = weights.unique().tolist()
    return found


@pytest.mark.parametrize(
    ("roles", "call", "end", "block"),
    [
        ((1, 2), "fsync", "full", False),
        ((1, 2), "write", "full", True),
        ((2, 0), "write", "full", False),
        ((1, 2), "fsync", "killed", False),
    ],
)
def test_a_rank_whose_storage_hangs_keeps_nobody_from_a_failure(
    tmp_path: Path, roles: tuple[int, int], call: str, end: str, block: bool
) -> None:
    """
    All raise the same, the hanging rank too; the next save works while it hangs, and after its call has returned.

    The bytes that the call had were not touched meanwhile, and nothing of it was committed.
    """
    failing, hanging = roles
    root = tmp_path / "root"
    found = run(tmp_path, 3, _save, str(root), roles, call, end, block)
    left = [one for one in found if one is not None]
    assert len(left) == (3 if end == "full" else 2)
    assert all(one["error"] == left[0]["error"] for one in left)
    kind, text = left[0]["error"]
    assert kind == "SaveFailed"
    assert f"rank {failing} " in text
    assert {"full": "No space left", "killed": "is silent"}[end] in text
    assert max(one["seconds"] for one in left) < SILENCE_S + 15
    assert found[hanging]["hangs"] == 1
    assert all(one["kept its bytes"] for one in left)
    if end == "full":
        for rank, one in enumerate(left):
            assert one["again"] == 3
            assert [one[f"restored {step}"] for step in (1, 3, 4)] == [[rank], [rank + 20], [rank + 30]]
    with CheckpointManager(root) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == ([1, 3, 4] if end == "full" else [1])


def _end(rank: int, root: str) -> float:
    pipeline_ranks.BREAK_OFF_S = 1.0
    system = Hanging()
    state = {"w": torch.full((4,), float(rank))}
    with CheckpointManager(LocalStorage(root, system=system), state) as manager:
        manager.save(1, block=True)
        system.fails, system.hangs = (_full, "") if rank else (None, "fsync")
        with pytest.raises(SaveFailed, match="No space left"):
            manager.save(2).result()
    began = time.monotonic()
    assert len(_parts()) == 1 - rank
    threading._shutdown()  # type: ignore[attr-defined]  # as Python does at its end: waits for every other thread
    return time.monotonic() - began


def test_a_process_ends_though_its_storage_hangs(tmp_path: Path) -> None:
    """One disk is full, the other never answers: both ranks close, and nothing keeps their interpreters."""
    assert max(run(tmp_path, 2, _end, str(tmp_path / "root"))) < 5


def _wait(rank: int, root: str) -> list[str]:
    together.SLOW_S = 1.5  # rather than 60: for this process, a child
    system, said = Hanging(), Said()
    logging.getLogger("ckptman").addHandler(said)
    with CheckpointManager(LocalStorage(root, system=system), {"w": torch.full((4,), float(rank))}) as manager:
        manager.save(1, block=True)
        if rank:
            system.hangs = "fsync"
            said.then = system.go.set
        assert manager.save(2).result().step == 2
    return said.texts


def test_where_nobody_fails_a_hanging_storage_is_waited_for_and_named(tmp_path: Path) -> None:
    """Slow is not lost: the save succeeds as soon as the call returns, and until then a warning says whose it is."""
    first, second = run(tmp_path, 2, _wait, str(tmp_path / "root"))
    assert first == []
    (text,) = second
    assert text.startswith("rank 1 (host ")
    assert "saving step 2: its storage has not answered for" in text
