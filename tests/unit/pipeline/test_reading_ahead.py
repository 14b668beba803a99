"""Copying a file: the next piece is read while the current one is written, checked all the same, never afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ckptman import CheckpointManager
from ckptman.errors import IntegrityError, StorageError
from ckptman.format.manifest import File, Manifest
from ckptman.pipeline import sending
from ckptman.repository.reading import Part, parts_of
from ckptman.repository.repository import Repository
from ckptman.storage.base import Buffer, NewFile
from ckptman.storage.memory import MemoryStorage

PIECE = 1 << 16
COUNT = 9


class Watched(MemoryStorage):
    """Tells which piece was asked for last, by the first byte."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()
        self.asked = -1

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        with self.changed:
            self.asked = start
            self.changed.notify_all()
        return super().read_into(key, start, into)

    def wait_for(self, start: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.asked >= start, timeout=10)


class Target(MemoryStorage):
    """Calls *on_write* with how many bytes were written before."""

    def __init__(self, on_write: object) -> None:
        super().__init__()
        self.on_write = on_write

    @contextmanager
    def open_new(self, key: str) -> Iterator[NewFile]:  # type: ignore[override]
        with super().open_new(key) as file:
            write, done = file.write, 0

            def watched(data: Buffer) -> None:
                nonlocal done
                self.on_write(done)  # type: ignore[operator]
                write(data)
                done += len(data)

            file.write = watched  # type: ignore[method-assign]
            yield file


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> tuple[Watched, Manifest, File, list[Part]]:
    monkeypatch.setattr(sending, "PIECE_NBYTES", PIECE)
    storage = Watched()
    with CheckpointManager(storage, {"w": torch.rand(COUNT * PIECE // 4 - 1000)}, rng=False) as manager:
        manager.save(1, block=True)
    (entry,) = Repository(storage).entries()
    manifest = Repository(storage).manifest(entry)
    storage.asked = -1
    return storage, manifest, manifest.files[0], parts_of(manifest)[0]


def test_the_next_piece_is_read_while_one_is_written(source: tuple[Watched, Manifest, File, list[Part]]) -> None:
    """Every write but the last waits until the next piece is asked for, and the copy is whole."""
    storage, manifest, file, parts = source
    last = (file.nbytes - 1) // PIECE * PIECE
    assert last >= 3 * PIECE
    overlapped: list[bool] = []
    target = Target(lambda done: overlapped.append(storage.wait_for(min(done + PIECE, last))))
    sending.send(storage, manifest, file, parts, target, "a/b")
    assert overlapped == [True] * (last // PIECE + 1)
    assert target.read("a/b", limit=1 << 30) == storage.read(file.path, limit=1 << 30)


def test_a_write_that_fails_ends_the_reading(source: tuple[Watched, Manifest, File, list[Part]]) -> None:
    """Once it is raised no thread is left, and nothing is stored."""
    storage, manifest, file, parts = source

    def fail(done: int) -> None:
        if done == PIECE:
            raise StorageError("the disk is full")

    target = Target(fail)
    with pytest.raises(StorageError, match="full"):
        sending.send(storage, manifest, file, parts, target, "a/b")
    assert storage.asked <= 2 * PIECE
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ckptman-copy")]
    assert target.listing("") == []


def test_damage_in_a_later_piece_stores_nothing(source: tuple[Watched, Manifest, File, list[Part]]) -> None:
    """A flipped bit is found by the thread that reads, and raised where the copy was asked for."""
    storage, manifest, file, parts = source
    data = bytearray(storage.read(file.path, limit=1 << 30))
    data[5 * PIECE] ^= 1
    storage.delete([file.path])
    storage.create(file.path, bytes(data))
    target = Target(lambda done: None)
    with pytest.raises(IntegrityError, match="damaged"):
        sending.send(storage, manifest, file, parts, target, "a/b")
    assert target.listing("") == []
