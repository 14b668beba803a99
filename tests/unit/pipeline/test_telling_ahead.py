"""What is told to the system before it is read: what is wanted and nothing else, and never a reason to fail."""

from __future__ import annotations

import errno
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptman import CheckpointManager
from ckptman.format.manifest import Manifest
from ckptman.pipeline import ahead
from ckptman.pipeline.ahead import reading_ahead
from ckptman.repository.repository import Repository
from ckptman.storage.local import LocalStorage
from ckptman.storage.system import System
from ckptman.testing.faults import FaultySystem, fail


class Told(System):
    """Remembers what was told and what was read of the files of tensors, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []
        self.order: list[str] = []

    def read_ahead(self, file: FileIO, start: int, nbytes: int) -> None:
        self.told.append((Path(str(file.name)).name, start, start + nbytes))
        self.order.append("told")
        super().read_ahead(file, start, nbytes)

    def read_into(self, file: FileIO, start: int, into: memoryview) -> int:
        if str(file.name).endswith(".safetensors"):
            self.order.append("read")
        return super().read_into(file, start, into)


def state(value: float) -> dict[str, Any]:
    return {
        "a": {str(n): torch.full((1000 + n,), value) for n in range(50)},
        "b": {"large": torch.full((3 << 20,), value)},
    }


def saved(root: Path) -> Manifest:
    with CheckpointManager(root, state(1.0), rng=False) as manager:
        manager.save(1, block=True)
    repository = Repository(LocalStorage(root))
    return repository.manifest(repository.entries()[0])


def tell_all(root: Path, manifest: Manifest, only: tuple[str, ...] | None) -> list[tuple[str, int, int]]:
    told = Told()
    with reading_ahead(LocalStorage(root, system=told), manifest, only):
        for thread in threading.enumerate():
            if thread.name == "ckptman-ahead":
                thread.join()
    return told.told


@pytest.mark.parametrize("only", [None, ("a",), ("b",), ("a", "b")])
def test_exactly_the_bytes_of_the_wanted_components_are_told(tmp_path: Path, only: tuple[str, ...] | None) -> None:
    """Whole tensors, together where they lie together; of a component that nobody wants, nothing."""
    manifest = saved(tmp_path)
    told = tell_all(tmp_path, manifest, only)
    wanted = [t for t in manifest.tensors if only is None or t.name[0] in only]
    assert sum(stop - start for _, start, stop in told) == sum(t.nbytes for t in wanted)
    for chunk in (chunk for tensor in wanted for chunk in tensor.chunks):
        name = Path(manifest.files[chunk.file].path).name
        covered = [
            min(stop, chunk.start + chunk.nbytes) - max(start, chunk.start)
            for file, start, stop in told
            if file == name
        ]
        assert sum(max(0, nbytes) for nbytes in covered) == chunk.nbytes
    assert len(told) <= 3  # fifty small ones at once; the large one in two steps


def test_no_more_is_told_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint larger than the cache may be: its beginning."""
    manifest = saved(tmp_path)
    monkeypatch.setattr(ahead, "AHEAD_NBYTES", 9 << 20)
    assert sum(stop - start for _, start, stop in tell_all(tmp_path, manifest, None)) == 9 << 20


def test_nothing_is_told_once_the_block_is_over(tmp_path: Path) -> None:
    """The thread ends with the block, between two steps, and the block waits for it."""
    manifest = saved(tmp_path)
    is_asked, may_go_on = threading.Event(), threading.Event()

    class Slow(Told):
        def read_ahead(self, file: FileIO, start: int, nbytes: int) -> None:
            super().read_ahead(file, start, nbytes)
            is_asked.set()
            assert may_go_on.wait(10)

    slow = Slow()
    with reading_ahead(LocalStorage(tmp_path, system=slow), manifest, ("b",)):
        assert is_asked.wait(10)
        threading.Timer(0.1, may_go_on.set).start()
    assert len(slow.told) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "ckptman-ahead"]


def test_a_system_that_cannot_be_told_restores_all_the_same(tmp_path: Path) -> None:
    """Every telling fails: nobody hears of it."""
    saved(tmp_path)
    faulty = FaultySystem(fail(1, errno.EIO, name="read_ahead", lasting=True))
    with CheckpointManager(LocalStorage(tmp_path, system=faulty), live := state(0.0), rng=False) as manager:
        assert manager.restore() is not None
    assert all(bool((tensor == 1).all()) for part in live.values() for tensor in part.values())


def test_a_missing_file_is_reported_by_whoever_reads_it(tmp_path: Path) -> None:
    """Telling says nothing of it; the restore names the file."""
    manifest = saved(tmp_path)
    (tmp_path / manifest.files[0].path).unlink()
    assert tell_all(tmp_path, manifest, ("a",)) == []


def test_a_restore_tells_before_it_reads(tmp_path: Path) -> None:
    """The telling is worth something only while nothing is read yet."""
    saved(tmp_path)
    told = Told()
    with CheckpointManager(LocalStorage(tmp_path, system=told), state(0.0), rng=False) as manager:
        manager.restore()
    assert "told" not in told.order[told.order.index("read") :]
