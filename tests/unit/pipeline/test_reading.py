"""Restoring on several threads: the same bytes, the first fault, and nobody left behind."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from ckptman import CheckpointManager, IntegrityError, Limits
from ckptman.errors import StorageError
from ckptman.format.digest import digests
from ckptman.format.manifest import Manifest, Tensor
from ckptman.pipeline.reading import fill
from ckptman.repository.repository import Repository
from ckptman.storage.local import LocalStorage

MIB = 1 << 20


def large() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "a": {
            "long": torch.randn(6 * MIB + 5),
            "turned": torch.randn(300, 700).t(),
            **{str(index): torch.randn(index % 50) for index in range(300)},
        },
        "b": {"bytes": torch.randint(0, 255, (20 * MIB,), dtype=torch.uint8), "half": torch.randn(99).half()},
    }


def stored(root: Path) -> tuple[LocalStorage, Manifest]:
    with CheckpointManager(root, large(), rng=False) as manager:
        manager.save(1, block=True)
    storage = LocalStorage(root)
    repository = Repository(storage)
    return storage, repository.manifest(repository.entries()[0])


def targets(manifest: Manifest) -> dict[str, torch.Tensor]:
    found = {t.name: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for t in manifest.tensors}
    found["a/turned"] = torch.zeros(300, 700).t()
    return found


def flip(root: Path, manifest: Manifest, name: str, byte: int) -> None:
    chunk = next(t for t in manifest.tensors if t.name == name).chunks[0]
    with (root / manifest.files[chunk.file].path).open("r+b") as file:
        file.seek(chunk.start + byte)
        old = file.read(1)
        file.seek(chunk.start + byte)
        file.write(bytes([old[0] ^ 4]))


@pytest.mark.parametrize("threads", [1, 2, 4, 9])
def test_every_target_is_filled_exactly(tmp_path: Path, threads: int) -> None:
    """Large, small, empty, turned, of two files: the same bytes on any number of threads; no thread stays."""
    storage, manifest = stored(tmp_path)
    found, expected = targets(manifest), large()
    fill(storage, manifest, found, threads=threads)
    for name, tensor in found.items():
        component, _, key = name.partition("/")
        assert torch.equal(tensor, expected[component][key]), name
    assert not [t for t in threading.enumerate() if t.name.startswith("ckptman-read")]


@pytest.mark.parametrize("length", [16, 18])
def test_a_target_of_another_size_is_refused_and_nothing_beside_it_is_touched(tmp_path: Path, length: int) -> None:
    """Bytes are placed by address: a target must have exactly as many as are stored."""
    storage, manifest = stored(tmp_path)
    around = torch.full((length + 2,), 7.0)
    with pytest.raises(ValueError, match=rf"'a/17' has {4 * length} bytes, not 68"):
        fill(storage, manifest, {"a/17": around[1:-1]})
    assert torch.equal(around, torch.full((length + 2,), 7.0))


def test_damage_in_any_block_is_named_and_the_first_one_wins(tmp_path: Path) -> None:
    """Every block of the large tensors, alone and with damage behind it: always the same error."""
    storage, manifest = stored(tmp_path)
    places = [(t.name, b * manifest.block_nbytes) for t in manifest.tensors for b in range(len(t.chunks[0].digests))]
    large_ones = [place for place in places if place[0] in ("a/long", "b/bytes")] + [("a/17", 3), ("a/turned", 9)]
    files = {name: next(t for t in manifest.tensors if t.name == name).chunks[0].file for name, _ in large_ones}
    for name, byte in large_ones:
        behind = ("b/bytes", 20 * MIB - 1)
        flip(tmp_path, manifest, name, byte)
        flip(tmp_path, manifest, *behind)
        for _ in range(3):
            with pytest.raises(IntegrityError) as caught:
                fill(storage, manifest, targets(manifest), threads=4)
            first = name if name != "a/turned" else behind[0]  # what takes a copy is read last
            assert caught.value.tensor == first
            assert caught.value.file == manifest.files[files[first]].path
        flip(tmp_path, manifest, name, byte)
        flip(tmp_path, manifest, *behind)
    assert len(large_ones) == 4 + 3 + 2
    fill(storage, manifest, targets(manifest), threads=4)


def test_a_target_that_is_not_row_major_takes_memory_for_one_block(tmp_path: Path) -> None:
    """A turned tensor of three blocks and a bit: every block is read into the same 8 MiB, and lies where it belongs."""
    torch.manual_seed(1)
    saved = torch.randn(1700, 4097)
    with CheckpointManager(tmp_path, {"big": saved}, rng=False) as manager:
        manager.save(1, block=True)
    reads: list[tuple[int, int]] = []

    class Watched(LocalStorage):
        def read_into(self, key: str, start: int, into: memoryview) -> int:
            reads.append((ctypes.addressof(ctypes.c_char.from_buffer(into)), len(into)))
            return super().read_into(key, start, into)

    live = torch.zeros(4097, 1700).t()
    with CheckpointManager(Watched(tmp_path), {"big": live}, rng=False) as manager:
        manager.restore()
    assert torch.equal(live, saved)
    blocks = reads[1:]  # the first one is the header
    assert [nbytes for _, nbytes in blocks] == [8 * MIB, 8 * MIB, 8 * MIB, saved.nbytes - 24 * MIB]
    assert len({address for address, _ in blocks}) == 1


def test_blocks_that_cut_elements_are_read_all_the_same(tmp_path: Path) -> None:
    """The format lets others digest blocks of 7 bytes: straight targets and turned ones get the right bytes."""
    storage, manifest = stored(tmp_path)
    data = {file.path: storage.read(file.path, limit=1 << 30) for file in manifest.files}

    def cut(tensor: Tensor) -> Tensor:
        (chunk,) = tensor.chunks
        whole = data[manifest.files[chunk.file].path][chunk.start : chunk.start + chunk.nbytes]
        return msgspec.structs.replace(tensor, chunks=(msgspec.structs.replace(chunk, digests=digests(whole, 7)),))

    names = ("a/turned", "a/33", "b/half")
    tensors = tuple(cut(tensor) for tensor in manifest.tensors if tensor.name in names)
    other = msgspec.structs.replace(manifest, block_nbytes=7, tensors=tensors)
    found = targets(other)
    fill(storage, other, found)
    assert all(torch.equal(found[name], large()[name[0]][name[2:]]) for name in names)


class Failing(LocalStorage):
    """Fails every read from the one on that comes after *after* reads; counts all."""

    after = 0
    reads = 0
    error: BaseException = StorageError("the cable was pulled", key="x")

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        self.reads += 1
        if self.reads > self.after:
            raise self.error
        return super().read_into(key, start, into)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_medium_that_fails_stops_all_threads(tmp_path: Path, threads: int) -> None:
    """StorageError comes through, and no more reads are begun than threads were at it."""
    _, manifest = stored(tmp_path)
    storage = Failing(tmp_path)
    for after in range(2, 7):
        storage.after, storage.reads = after, 0
        with pytest.raises(StorageError, match="cable"):
            fill(storage, manifest, targets(manifest), threads=threads)
        assert storage.reads <= after + threads
        assert not [t for t in threading.enumerate() if t.name.startswith("ckptman-read")]


def test_ctrl_c_joins_the_threads(tmp_path: Path) -> None:
    """KeyboardInterrupt on the calling thread: raised, and nothing reads any more."""
    _, manifest = stored(tmp_path)
    main = threading.current_thread()

    class Interrupted(LocalStorage):
        reads = 0

        def read_into(self, key: str, start: int, into: memoryview) -> int:
            self.reads += 1
            if self.reads > 3 and threading.current_thread() is main:
                raise KeyboardInterrupt
            return super().read_into(key, start, into)

    with pytest.raises(KeyboardInterrupt):
        fill(Interrupted(tmp_path), manifest, targets(manifest), threads=4)
    assert not [t for t in threading.enumerate() if t.name.startswith("ckptman-read")]


def test_only_reads_only_that(tmp_path: Path) -> None:
    """Bytes read for only=("b",): those of b's file, not a's, whatever the number of threads."""
    stored(tmp_path)
    read = 0

    class Counting(LocalStorage):
        def read_into(self, key: str, start: int, into: memoryview) -> int:
            nonlocal read
            assert "/a." not in key
            read += len(into)
            return super().read_into(key, start, into)

    with CheckpointManager(Counting(tmp_path), large(), rng=False, limits=Limits(io_threads=3)) as manager:
        manager.restore(only=("b",))
    assert 20 * MIB <= read <= 20 * MIB + 10_000


def test_small_neighbours_are_read_through_memory_that_is_used_again(tmp_path: Path) -> None:
    """A hundred tensors of 100 kB: a MiB at a time, each thread into the same bytes every time."""
    state = {"small": {str(number): torch.full((25_000,), float(number)) for number in range(100)}}
    with CheckpointManager(tmp_path, state, rng=False) as manager:
        manager.save(1, block=True)
    reads: list[tuple[str, int, int]] = []
    held: list[memoryview] = []  # so that memory that is not used again is not handed out again either

    class Watched(LocalStorage):
        def read_into(self, key: str, start: int, into: memoryview) -> int:
            held.append(into)
            if start:  # not the header
                address = ctypes.addressof(ctypes.c_char.from_buffer(into))
                reads.append((threading.current_thread().name, address, len(into)))
            return super().read_into(key, start, into)

    live = {"small": {name: torch.zeros_like(tensor) for name, tensor in state["small"].items()}}
    with CheckpointManager(Watched(tmp_path), live, rng=False) as manager:
        manager.restore()
    assert all(torch.equal(live["small"][name], tensor) for name, tensor in state["small"].items())
    assert len(reads) == 10
    assert max(nbytes for _, _, nbytes in reads) <= MIB
    largest: dict[str, int] = {}
    moves = 0
    for thread, _, nbytes in reads:  # new memory only where more is needed than before
        moves += nbytes > largest.get(thread, 0)
        largest[thread] = max(nbytes, largest.get(thread, 0))
    assert len({(thread, address) for thread, address, _ in reads}) <= moves < len(reads)
