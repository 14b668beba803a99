"""Restoring from a distant storage: wide ranges that begin where its own parts do, each byte checked all the same."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptman import CheckpointManager, IntegrityError
from ckptman.format.manifest import Manifest
from ckptman.pipeline.reading import fill
from ckptman.repository.repository import Repository
from ckptman.storage.driver import get_each
from ckptman.storage.local import LocalStorage

MIB = 1 << 20
WIDE = 16 * MIB


class Distant(LocalStorage):
    """Files as if they were across a network, and what was asked for by ranges: key, start, stop."""

    read_nbytes = WIDE

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[str, int, int]] = []
        self.mutex = threading.Lock()

    def read_into_each(self, key: str, start: int, into: Sequence[memoryview]) -> int:
        with self.mutex:
            self.asked.append((key, start, start + sum(map(len, into))))
        return get_each(self.read_into, key, start, into)

    def read_beginning(self, key: str, into: memoryview) -> tuple[int, int]:
        return self.read_into(key, 0, into), self.size(key)


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "a": {
            "long": torch.randn(11 * MIB + 5),
            "turned": torch.randn(300, 700).t(),
            "middle": torch.randn(3 * MIB),
            **{f"{index:03}": torch.randn(index % 50) for index in range(300)},
            "empty": torch.empty(0),
        },
        "b": {f"{index:02}": torch.randn(MIB) for index in range(12)},
    }


def stored(root: Path) -> tuple[Distant, Manifest]:
    with CheckpointManager(root, state(), rng=False) as manager:
        manager.save(1, block=True)
    storage = Distant(root)
    repository = Repository(storage)
    return storage, repository.manifest(repository.entries()[0])


def targets(manifest: Manifest) -> dict[str, torch.Tensor]:
    found = {t.name: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for t in manifest.tensors}
    found["a/turned"] = torch.zeros(300, 700).t()
    return found


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("wide", [MIB // 3, 5 * MIB, 1 << 40])
def test_every_target_is_filled_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, wide: int
) -> None:
    """However wide the ranges are: narrower than a block, across several tensors, or all of a file."""
    storage, manifest = stored(tmp_path)
    monkeypatch.setattr(Distant, "read_nbytes", wide)
    found, expected = targets(manifest), state()
    fill(storage, manifest, found, threads=threads)
    for name, tensor in found.items():
        component, _, key = name.partition("/")
        assert torch.equal(tensor, expected[component][key]), name


def test_a_file_is_read_once_by_few_requests(tmp_path: Path) -> None:
    """Ranges end at multiples of 16 MiB, or where 8 MiB were read beside; no byte is asked for twice."""
    storage, manifest = stored(tmp_path)
    found = targets(manifest)
    fill(storage, manifest, found, threads=4)
    for file in manifest.files:
        asked = sorted((start, stop) for key, start, stop in storage.asked if key == file.path)
        assert all(start // WIDE == (stop - 1) // WIDE for start, stop in asked)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(asked))
    straight = next(file for file in manifest.files if "/a." in file.path)
    count = len([key for key, _, _ in storage.asked if key == straight.path])
    assert count <= 2 * -(-straight.nbytes // WIDE)


def test_only_what_is_wanted_is_asked_for(tmp_path: Path) -> None:
    """Between two tensors that are far from each other nothing is read."""
    storage, manifest = stored(tmp_path)
    wanted = {name: tensor for name, tensor in targets(manifest).items() if name in ("b/00", "b/10", "a/007")}
    fill(storage, manifest, wanted, threads=4)
    assert len(storage.asked) == 3
    assert sum(stop - start for _, start, stop in storage.asked) == sum(one.nbytes for one in wanted.values())
    assert all(torch.equal(wanted[f"b/{key}"], state()["b"][key]) for key in ("00", "10"))


@pytest.mark.parametrize("name", ["a/long", "a/middle", "a/040", "b/00", "b/07"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str, share: float, threads: int) -> None:
    """In a block that lies across two ranges too; the error names the file and the tensor."""
    storage, manifest = stored(tmp_path)
    chunk = next(t for t in manifest.tensors if t.name == name).chunks[0]
    path = manifest.files[chunk.file].path
    with (tmp_path / path).open("r+b") as file:
        file.seek(chunk.start + int(share * (chunk.nbytes - 1)))
        old = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old[0] ^ 4]))
    with pytest.raises(IntegrityError) as caught:
        fill(storage, manifest, targets(manifest), threads=threads)
    assert (caught.value.file, caught.value.tensor) == (path, name)


def test_of_two_faults_the_first_one_is_told(tmp_path: Path) -> None:
    """Of blocks in different ranges, whichever thread is done first."""
    storage, manifest = stored(tmp_path)
    chunk = next(t for t in manifest.tensors if t.name == "a/long").chunks[0]
    for at in (20 * MIB, 40 * MIB):
        with (tmp_path / manifest.files[chunk.file].path).open("r+b") as file:
            file.seek(chunk.start + at)
            file.write(b"xxxxxxxx")
    for _ in range(5):
        with pytest.raises(IntegrityError, match=rf"bytes {chunk.start + 16 * MIB} to {chunk.start + 24 * MIB}"):
            fill(storage, manifest, targets(manifest), threads=4)


def test_a_file_that_ends_early_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range that came short, though the size was right."""
    storage, manifest = stored(tmp_path)
    monkeypatch.setattr(Distant, "read_into_each", lambda self, key, start, into: sum(map(len, into)) - 1)
    with pytest.raises(IntegrityError, match="ends at byte"):
        fill(storage, manifest, targets(manifest))
