"""A mirror beside a job of several ranks: one of them copies, and all restore the same checkpoint of either root."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from fleet import run

from ckptman import CheckpointManager
from ckptman.events import Mirrored, Restored
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.local import LocalStorage


def _state(rank: int, value: float) -> dict[str, Any]:
    return {"shared": torch.full((100,), value), "mine": {"table": torch.full((10,), value + rank)}}


def _save(rank: int, root: str, mirror: str) -> int:
    events: list[object] = []
    state = _state(rank, 0.0)
    with CheckpointManager(root, state, mirror=mirror, hooks=[events.append]) as manager:
        for step in (1, 2):
            state["shared"].fill_(step)
            state["mine"]["table"].fill_(step + 10 * rank)
            manager.save(step, block=True)
    return sum(isinstance(event, Mirrored) for event in events)


def _restore(rank: int, root: str, mirror: str) -> list[Any]:
    events: list[object] = []
    state = _state(rank, -1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with CheckpointManager(root, state, mirror=mirror, hooks=[events.append]) as manager:
            found = manager.restore()
    assert found is not None
    assert sum(isinstance(event, Restored) for event in events) == 1
    return [found.step, found.url, float(state["shared"][0]), float(state["mine"]["table"][0])]


def test_all_ranks_restore_from_the_mirror(tmp_path: Path) -> None:
    """Where the root's newest is damaged, and where the root is gone: each gets its own part back from there."""
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    mirrored = run(tmp_path, 2, _save, str(root), str(mirror))
    assert mirrored[0] >= 1
    assert mirrored[1] == 0, "one rank copies"
    entries = Repository(LocalStorage(mirror)).entries()
    assert (entries[-1].step, entries[-1].world_size) == (2, 2)
    assert [verify(Repository(LocalStorage(mirror)), entry) for entry in entries] == [[]] * len(entries)
    (file,) = root.glob("step-000000000002.*/mine.rank-00001.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    for _ in range(2):
        for rank, (step, url, shared, mine) in enumerate(run(tmp_path, 2, _restore, str(root), str(mirror))):
            assert (step, shared, mine) == (2, 2.0, 2.0 + 10 * rank)
            assert url.startswith(str(mirror))
        shutil.rmtree(root, ignore_errors=True)
