"""Comparing two checkpoints by their manifests, and reading every byte again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptman import CheckpointManager
from ckptman.repository.diff import difference
from ckptman.repository.repair import diagnose, repair
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.local import LocalStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {"x": {"same": torch.rand(100), "changed": torch.rand(100), "gone": torch.rand(2), "shape": torch.rand(4)}}
    with CheckpointManager(tmp_path, state, rng=False) as manager:
        manager.save(1, block=True)
        x = state["x"]
        x["changed"][3] += 1
        del x["gone"]
        x["shape"] = torch.rand(2, 2)
        x["new"] = torch.rand(3 << 20)
        manager.save(2, block=True)
    return tmp_path


def test_difference_names_what_changed(root: Path) -> None:
    """Added, removed, reshaped, changed, and the count of what is the same."""
    repository = Repository(LocalStorage(root))
    a, b = (repository.manifest(entry) for entry in repository.entries())
    found = difference(a, b)
    assert found.added == ("x/new",)
    assert found.removed == ("x/gone",)
    assert found.reshaped == ("x/shape",)
    assert found.changed == ("x/changed",)
    assert found.same == 1
    assert difference(b, b).same == 4


def test_verify_reads_every_byte_and_names_each_fault(root: Path) -> None:
    """An intact checkpoint has none and all bytes are counted; two damaged tensors of one file are both named."""
    repository = Repository(LocalStorage(root))
    entry = repository.entries()[1]
    read: list[int] = []
    assert verify(repository, entry, progress=read.append) == []
    assert sum(read) == entry.nbytes
    manifest = repository.manifest(entry)
    (file,) = manifest.files
    path = root / file.path
    data = bytearray(path.read_bytes())
    starts = {tensor.name: tensor.chunks[0].start for tensor in manifest.tensors}
    for name in ("x/same", "x/new"):
        data[starts[name]] ^= 1
    path.write_bytes(data)
    faults = verify(repository, entry)
    assert {fault.tensor for fault in faults} == {"x/same", "x/new"}
    assert {fault.file for fault in faults} == {file.path}
    path.unlink()
    assert [fault.what for fault in verify(repository, entry)] == [f"step 2: {file.path} is missing"]


def test_repair_brings_back_a_lost_catalog(root: Path) -> None:
    """Without any record the manifests are enough: same checkpoints, same order; then nothing is left to repair."""
    storage = LocalStorage(root)
    before = Repository(storage).entries()
    assert diagnose(storage).is_healthy
    for path in (root / "catalog").iterdir():
        path.unlink()
    (root / "ckptman.json").write_bytes(b"\x00")
    found = repair(storage, timeout_s=0)
    assert [entry.step for entry in found.adopted] == [1, 2]
    assert found.marker == "ckptman.json is damaged"
    assert Repository(storage).entries() == before
    assert diagnose(storage).is_healthy
    with CheckpointManager(root, {"x": {}}, rng=False) as manager:
        assert manager.restore().step == 2  # type: ignore[union-attr]
        manager.save(3, block=True)
