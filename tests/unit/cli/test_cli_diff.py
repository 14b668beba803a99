"""``ckptman diff``: names, amounts of change for every kind of element, and values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
import torch
from cli_roots import Run, flip

from ckptman import CheckpointManager
from ckptman.cli._values import changed_values
from ckptman.format.digest import BLOCK_NBYTES, block_digest
from ckptman.format.manifest import Manifest
from ckptman.format.values import to_json
from ckptman.pipeline.compare import TensorChange, compare
from ckptman.repository.diff import difference
from ckptman.repository.repository import Repository, find
from ckptman.storage.local import LocalStorage


def saved(root: Path, *tensors: torch.Tensor) -> tuple[LocalStorage, list[Manifest]]:
    """A root with one checkpoint of each of *tensors*, and the manifests."""
    for step, tensor in enumerate(tensors):
        with CheckpointManager(root, {"x": {"t": tensor}}, rng=False) as manager:
            manager.save(step, block=True)
    repository = Repository(LocalStorage(root))
    entries = repository.entries()
    return LocalStorage(root), [repository.manifest(find(entries, step, "")) for step in range(len(tensors))]


def change(root: Path, old: torch.Tensor, new: torch.Tensor) -> TensorChange:
    storage, (a, b) = saved(root, old, new)
    (found,) = compare(storage, a, b, difference(a, b).changed)
    assert found.name == "x/t"
    return found


def test_diff_document(run: Run, made_root: Path) -> None:
    """What came, went and changed between steps 10 and 20, and the values that changed."""
    document = run("diff", made_root, 10, 20, "--json").document
    (changed,) = document["changed"]
    assert changed["name"] == "weights/w"
    assert changed["max_abs"] == pytest.approx(1)
    assert 0 < changed["relative"] < 1
    assert document["added"] == ["weights/new"]
    assert document["removed"] == ["weights/gone"]
    assert document["reshaped"] == []
    assert document["same"] == 1
    assert {"name": "trainer.epoch", "a": 10, "b": 20} in document["values"]
    text = run("diff", made_root, 10, 20).out
    assert "added     weights/new" in text
    assert "removed   weights/gone" in text
    assert "1 tensor changed, 1 the same" in text


def test_a_checkpoint_does_not_differ_from_itself(run: Run, made_root: Path) -> None:
    """Nothing added, removed, reshaped or changed."""
    assert run("diff", made_root, 30, "latest", "--json").document == {
        "schema": 1, "added": [], "removed": [], "reshaped": [], "changed": [], "same": 3, "values": [],
    }  # fmt: skip


def test_damage_is_not_a_difference(run: Run, root: Path) -> None:
    """A changed tensor whose bytes are damaged is exit 4, not an amount."""
    repository = Repository(LocalStorage(root))
    manifest = repository.manifest(find(repository.entries(), 20, ""))
    (chunk,) = next(tensor for tensor in manifest.tensors if tensor.name == "weights/w").chunks
    flip(root / manifest.files[chunk.file].path, chunk.start)
    ran = run("diff", root, 10, 20, "--json")
    assert ran.code == 4
    assert ran.failure["error"] == "IntegrityError"


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64,
        torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fnuz,
    ],
)  # fmt: skip
def test_amounts_for_every_number(tmp_path: Path, dtype: torch.dtype) -> None:
    """[3, 4] → [3, 8]: the largest change is 4, and relative to the norm 5 it is 0.8."""
    old, new = (torch.tensor(values, dtype=torch.float64).to(dtype) for values in ([3, 4], [3, 8]))
    found = change(tmp_path, old, new)
    assert found.max_abs == pytest.approx(4)
    assert found.relative == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("old", "new", "max_abs", "relative"),
    [
        ([math.nan, 3.0], [math.nan, 6.0], 3, 1),
        ([math.inf, 3.0], [math.inf, 6.0], 3, 1),
        ([1.0, 3.0], [math.nan, 3.0], math.nan, math.nan),
        ([math.nan, 3.0], [1.0, 3.0], math.nan, math.nan),
        ([1.0, 3.0], [math.inf, 3.0], math.inf, math.inf),
        ([0.0, 0.0], [0.0, 1.0], 1, math.inf),
        ([0.0, 1.0], [-0.0, 1.0], 0, 0),
    ],
)
def test_numbers_that_are_none(
    tmp_path: Path, old: list[float], new: list[float], max_abs: float, relative: float
) -> None:
    """NaN that stays NaN is no change; NaN that comes or goes is told as NaN; infinities and zeros likewise."""
    found = change(tmp_path, torch.tensor(old), torch.tensor(new))
    assert found.max_abs == pytest.approx(max_abs, nan_ok=True)
    assert found.relative == pytest.approx(relative, nan_ok=True)


def test_booleans(tmp_path: Path) -> None:
    """A flipped boolean is a change of 1."""
    assert change(tmp_path, torch.tensor([True, False]), torch.tensor([True, True])).max_abs == 1


@pytest.mark.parametrize("dtype", [torch.bits8, torch.uint4, torch.int4, torch.float4_e2m1fn_x2])
def test_types_without_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of bits and sub-byte numbers it is only known that bytes differ."""
    old, new = (torch.tensor(values, dtype=torch.uint8).view(dtype) for values in ([1, 2], [1, 3]))
    assert change(tmp_path, old, new) == TensorChange(name="x/t", max_abs=None, relative=None)


class MeasuredStorage(LocalStorage):
    """A local storage that remembers what was read: the key, and how many bytes at once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[tuple[str, int]] = []

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        self.reads.append((key, len(into)))
        return super().read_into(key, start, into)


def test_large_tensors_take_one_block_of_memory(tmp_path: Path) -> None:
    """A tensor of several blocks is compared block by block, the last one too: old and new are read in turn."""
    old = torch.zeros(3 * BLOCK_NBYTES // 4 + 5)
    old[0] = 2
    new = old.clone()
    new[-1] = 7
    _, (a, b) = saved(tmp_path, old, new)
    storage = MeasuredStorage(tmp_path)
    (found,) = compare(storage, a, b, ["x/t"])
    assert (found.max_abs, found.relative) == (7, 3.5)
    assert storage.reads == [
        (manifest.files[0].path, nbytes) for nbytes in (*[BLOCK_NBYTES] * 3, 20) for manifest in (a, b)
    ]


def test_chunks_that_are_cut_differently(tmp_path: Path) -> None:
    """The same tensor in one chunk and in two is compared by elements, not by where they lie."""
    old = torch.arange(8.0).reshape(4, 2)
    new = old.clone()
    new[3, 1] = 9
    storage, (a, b) = saved(tmp_path, old, new)
    (tensor,) = b.tensors
    (chunk,) = tensor.chunks
    data = new.numpy().tobytes()
    halves = [
        msgspec.structs.replace(
            chunk,
            start=chunk.start + 16 * half,
            nbytes=16,
            digests=(block_digest(data[16 * half : 16 * half + 16]),),
            offset=(2 * half, 0),
            shape=(2, 2),
        )
        for half in (1, 0)
    ]
    cut = msgspec.structs.replace(b, tensors=(msgspec.structs.replace(tensor, chunks=tuple(halves)),))
    (found,) = compare(storage, a, cut, ["x/t"])
    assert found.max_abs == 2


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, [("a", 1, 2)]),
        ({"a": 1}, {"a": 1.0}, [("a", 1, 1.0)]),
        ({"a": 1}, {"a": True}, [("a", 1, True)]),
        ({"a": math.nan}, {"a": math.nan}, []),
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}, [("a.b[1].c", 2, 3)]),
        ({"a": (1, 2)}, {"a": (1, 3)}, [("a[1]", 2, 3)]),
        ({"a": (1, 2)}, {"a": [1, 2]}, [("a", [1, 2], [1, 2])]),
        ({"a": {3: "x"}}, {"a": {3: "y"}}, [("a[3]", "x", "y")]),
        ({"a": 1}, {"b": 1}, [("a", 1, None), ("b", None, 1)]),
        ({"a": [0] * 20}, {"a": [1] * 20}, [("a", [0] * 6 + ["… 14 more"], [1] * 6 + ["… 14 more"])]),
    ],
)
def test_changed_values(old: object, new: object, expected: list[tuple[str, object, object]]) -> None:
    """Each change has its path and both values; types count, equal NaNs do not; long lists are told as a whole."""
    found = list(changed_values(to_json(old, ""), to_json(new, "")))
    assert json.dumps(found) == json.dumps(expected)
