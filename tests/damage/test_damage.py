"""Damage of every kind: named by verify, passed over by restore, never restored."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptman import CheckpointManager, FormatError, IntegrityError, SaveFailed, StateMismatch
from ckptman.errors import StorageError
from ckptman.format.catalog import Entry
from ckptman.format.names import record_key
from ckptman.repository.head import read_head, record_numbers
from ckptman.repository.repair import repair
from ckptman.repository.repository import DamagedCheckpointWarning, Repository
from ckptman.repository.verify import verify
from ckptman.storage.local import LocalStorage

STEPS = (1, 2, 3)


def state_of(version: int) -> dict[str, Any]:
    return {
        "weights": torch.full((64,), float(version)),
        "moments": {"mean": torch.full((16,), float(version)), "count": version},
    }


def says(state: dict[str, Any], version: int) -> bool:
    tensors = (state["weights"], state["moments"]["mean"])
    return all(bool((tensor == version).all()) for tensor in tensors) and state["moments"]["count"] == version


def manager_of(root: Path, state: dict[str, Any]) -> CheckpointManager:
    return CheckpointManager(root, state, rng=False, lock_timeout=0)


def save(root: Path, *steps: int) -> None:
    state = state_of(0)
    with manager_of(root, state) as manager:
        for step in steps:
            state["weights"].fill_(step)
            state["moments"]["mean"].fill_(step)
            state["moments"]["count"] = step
            manager.save(step, block=True)


@pytest.fixture
def root(scratch: Path) -> Path:
    """A root with steps 1 to 3; each says its step in every byte."""
    save(scratch / "root", *STEPS)
    return scratch / "root"


def entry_of(root: Path, step: int) -> Entry:
    return next(entry for entry in Repository(LocalStorage(root)).entries() if entry.step == step)


def attempt(root: Path, step: int) -> Path:
    return root / entry_of(root, step).attempt


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-nbytes])


WEIGHTS, MOMENTS, MANIFEST = "weights.safetensors", "moments.safetensors", "manifest.json"

DAMAGES: dict[str, tuple[Callable[[Path], object], str, str | None]] = {
    "flip in weights": (lambda at: flip(at / WEIGHTS, -1), WEIGHTS, "weights"),
    "flip in moments": (lambda at: flip(at / MOMENTS, -1, 7), MOMENTS, "moments"),
    "flip in header": (lambda at: flip(at / WEIGHTS, 12), WEIGHTS, None),
    "flip in header length": (lambda at: flip(at / MOMENTS, 0), MOMENTS, None),
    "flip in manifest": (lambda at: flip(at / MANIFEST, 300), MANIFEST, None),
    "cut data": (lambda at: cut(at / WEIGHTS, 1), WEIGHTS, None),
    "empty data": (lambda at: (at / MOMENTS).write_bytes(b""), MOMENTS, None),
    "longer data": (lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes() + b"\0"), WEIGHTS, None),
    "cut manifest": (lambda at: cut(at / MANIFEST, 1), MANIFEST, None),
    "no data": (lambda at: (at / MOMENTS).unlink(), MOMENTS, None),
    "no manifest": (lambda at: (at / MANIFEST).unlink(), MANIFEST, None),
    "no folder": (shutil.rmtree, MANIFEST, None),
    "swapped files": (lambda at: swap(at / WEIGHTS, at / MOMENTS), WEIGHTS, None),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_passed_over(root: Path, name: str) -> None:
    """
    verify names file and tensor; restore() warns, takes the older one and says so; restore(step) raises with file and
    tensor; the manager refuses to save a mixture until a restore succeeds.
    """
    damage, file, component = DAMAGES[name]
    folder = attempt(root, 3)
    damage(folder)
    key = f"{folder.name}/{file}"
    faults = verify(Repository(LocalStorage(root)), entry_of(root, 3))
    assert key in [fault.file for fault in faults]
    if component is not None:
        assert [str(fault.tensor).partition("/")[0] for fault in faults] == [component]

    state = state_of(0)
    with manager_of(root, state) as manager:
        with pytest.raises(IntegrityError) as caught:
            manager.restore(3)
        assert caught.value.step == 3
        assert caught.value.file == key or name == "swapped files"
        assert (caught.value.tensor is not None) == (component is not None)
        if not says(state, 0):
            with pytest.raises(SaveFailed, match="half restored"):
                manager.save(4)
        with pytest.warns(DamagedCheckpointWarning, match="step 3"):
            found = manager.restore()
        assert found is not None
        assert found.step == 2
        assert says(state, 2)
        assert [skipped.step for skipped in found.skipped] == [3]
        assert key in found.skipped[0].reason or name == "swapped files"
        assert manager.save(4, block=True).step == 4


def test_a_failed_restore_refuses_saves_until_one_succeeds(root: Path) -> None:
    """A state that is a mixture is never saved; that of an intact checkpoint is again."""
    flip(attempt(root, 3) / WEIGHTS, -1)
    with manager_of(root, state_of(0)) as manager:
        with pytest.raises(IntegrityError):
            manager.restore(3)
        with pytest.raises(SaveFailed, match="half restored"):
            manager.save(4, block=True)
        manager.restore(1)
        manager.save(4, block=True)
    assert [e.step for e in Repository(LocalStorage(root)).entries()] == [1, 2, 3, 4]


def test_files_of_two_checkpoints_that_were_swapped(root: Path) -> None:
    """Files of equal size under each other's names: both checkpoints are damaged, and neither is restored."""
    swap(attempt(root, 2) / WEIGHTS, attempt(root, 3) / WEIGHTS)
    state = state_of(0)
    with manager_of(root, state) as manager, pytest.warns(DamagedCheckpointWarning):
        found = manager.restore()
    assert found is not None
    assert [found.step, *(s.step for s in found.skipped)] == [1, 3, 2]
    assert says(state, 1)


@pytest.mark.parametrize("what", [MANIFEST, WEIGHTS, ""], ids=["manifest", "data", "attempt"])
def test_a_symbolic_link_is_refused(root: Path, what: str) -> None:
    """A link in place of a manifest, data file or attempt is not followed, even if all behind it is intact."""
    planted = attempt(root, 3) / what if what else attempt(root, 3)
    moved = root.parent / "moved"
    planted.rename(moved)
    planted.symlink_to(moved)
    state = state_of(0)
    with manager_of(root, state) as manager, pytest.raises((IntegrityError, StorageError), match=r"link|missing"):
        manager.restore(3)
    assert says(state, 0)


@pytest.mark.parametrize("what", [MANIFEST, WEIGHTS, ""], ids=["manifest", "data", "attempt"])
def test_what_a_symbolic_link_stands_for_is_damaged(root: Path, what: str) -> None:
    """Restore walks back to an older checkpoint, and verify names the link; nothing behind it is read."""
    planted = attempt(root, 3) / what if what else attempt(root, 3)
    planted.rename(root.parent / "moved")
    planted.symlink_to(root.parent / "moved")
    state = state_of(0)
    with manager_of(root, state) as manager, pytest.warns(DamagedCheckpointWarning, match="symbolic link"):
        found = manager.restore()
    assert found is not None
    assert found.step == 2
    assert says(state, 2)
    repository = Repository(LocalStorage(root))
    faults = verify(repository, repository.entries()[-1])
    assert faults
    assert all("symbolic link" in fault.what for fault in faults)


def test_if_all_are_damaged_that_is_said(root: Path) -> None:
    """With nothing intact, restore raises: None would mean a new run, which would overwrite the old one."""
    for step in STEPS:
        flip(attempt(root, step) / MOMENTS, -1)
    with (
        manager_of(root, state_of(0)) as manager,
        pytest.warns(DamagedCheckpointWarning),
        pytest.raises(IntegrityError, match="all 3"),
    ):
        manager.restore()


def newest_record(root: Path) -> Path:
    return root / record_key(record_numbers(LocalStorage(root))[-1])


@pytest.mark.parametrize("mend", ["save", "repair"])
def test_a_damaged_newest_record(root: Path, mend: str) -> None:
    """It is passed over with a warning; the next save, or repair, lists again what only it had listed."""
    flip(newest_record(root), 200)
    state = state_of(0)
    with manager_of(root, state) as manager:
        with pytest.warns(DamagedCheckpointWarning, match="record 4"):
            found = manager.restore()
        assert found is not None
        assert found.step == 2
        if mend == "save":
            manager.save(4, block=True)
            assert [one.step for one in manager.checkpoints()] == [1, 2, 3, 4]
    if mend == "repair":
        assert [entry.step for entry in repair(LocalStorage(root), timeout_s=0).adopted] == [3]
    restored_at = {step: state_of(0) for step in STEPS}
    for step, fresh in restored_at.items():
        with manager_of(root, fresh) as manager:
            manager.restore(step)
        assert says(fresh, step)


@pytest.mark.parametrize("how", ["all flipped", "all torn", "removed"])
def test_a_lost_catalog_is_no_new_root(root: Path, how: str) -> None:
    """Checkpoints without a readable record are a FormatError for readers and writers; repair brings all back."""
    if how == "removed":
        shutil.rmtree(root / "catalog")
    for number in record_numbers(LocalStorage(root)):
        path = root / record_key(number)
        flip(path, -10) if how == "all flipped" else cut(path, 50)
    state = state_of(0)
    with manager_of(root, state) as manager:
        for forbidden in (manager.restore, manager.checkpoints, lambda: manager.save(4, block=True)):
            with pytest.raises(FormatError, match="repair"):
                forbidden()
    repair(LocalStorage(root), timeout_s=0)
    with manager_of(root, state) as manager:
        assert [one.step for one in manager.checkpoints()] == [1, 2, 3]
        for step in STEPS:
            manager.restore(step)
            assert says(state, step)
        manager.save(4, block=True)


def sealed(body: bytes) -> bytes:
    return b'{"sha256":"%s","body":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def test_a_record_of_a_newer_format_names_both(root: Path) -> None:
    """A record that a newer version wrote is not damage: nobody passes over it, reads below it or writes on it."""
    path = newest_record(root)
    body = json.loads(path.read_bytes())["body"]
    path.write_bytes(sealed(json.dumps(body | {"format": 2, "surprise": 1}, separators=(",", ":")).encode()))
    with manager_of(root, state_of(0)) as manager:
        for forbidden in (manager.restore, lambda: manager.save(4, block=True)):
            with pytest.raises(FormatError, match=r"format 2.*up to 1"):
                forbidden()


def test_a_renamed_record_is_passed_over(root: Path) -> None:
    """Under another number it would change the order of history; what it added comes back with the next save."""
    newest_record(root).rename(root / record_key(9))
    state = state_of(0)
    with manager_of(root, state) as manager:
        with pytest.warns(DamagedCheckpointWarning, match="record 9"):
            found = manager.restore()
        assert found is not None
        assert found.step == 2
        assert says(state, 2)
        manager.save(4, block=True)
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 2, 3, 4]


@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_huge_nested_record(root: Path, is_sealed: bool) -> None:
    """A hundred thousand brackets crash nothing: passed over if torn, refused if somebody sealed them."""
    deep = b'{"format":1,"root":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (root / record_key(5)).write_bytes(sealed(deep) if is_sealed else deep)
    with manager_of(root, state_of(0)) as manager:
        if is_sealed:
            with pytest.raises(FormatError, match="record 5"):
                manager.restore()
        else:
            with pytest.warns(DamagedCheckpointWarning, match="record 5"):
                found = manager.restore()
            assert found is not None
            assert found.step == 3


def test_one_flipped_bit_anywhere_is_never_restored(root: Path) -> None:
    """
    One bit flipped, at places spread over all files: restore gives a checkpoint exactly as saved, or an error; and
    restore(3) gives step 3 or an error. A file whose damage is not noticed is one that restore has no need of.
    """
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size]
    total = sum(path.stat().st_size for path in files)
    stride = max(1, total // 500)
    outcomes: Counter[str] = Counter()
    kinds: set[str] = set()
    offset = 0
    for path in files:
        intact = path.read_bytes()
        for at in range(offset % stride, len(intact), stride):
            flip(path, at, at % 8)
            outcomes[restored(root, "latest")] += 1
            assert restored(root, 3) in ("step 3", "IntegrityError", "FormatError", "CheckpointNotFound")
            path.write_bytes(intact)
            kinds.add(path.name)
        offset += stride - len(intact) % stride if len(intact) % stride else 0
    print(f"{outcomes.total()} bits flipped in {len(files)} files of {total} bytes: {dict(outcomes)}")
    assert outcomes.total() >= 200
    assert {WEIGHTS, MOMENTS, MANIFEST} <= kinds
    assert outcomes["step 2"] >= 50
    assert set(outcomes) <= {"step 3", "step 2", "FormatError"}


def restored(root: Path, which: int | str) -> str:
    """What a restore gives: ``step 2`` if every byte is that of step 2, or the error's name."""
    state = state_of(0)
    manager = manager_of(root, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedCheckpointWarning)
        try:
            found = manager.restore(which)
        except (IntegrityError, FormatError, LookupError) as error:
            return type(error).__name__
    assert found is not None
    assert says(state, found.step), f"restored something else than step {found.step}"
    return f"step {found.step}"


def test_a_damaged_marker_stops_writers_and_no_reader(root: Path) -> None:
    """ckptman.json is no part of any checkpoint: reading goes on, writing says what to do."""
    (root / "ckptman.json").write_bytes(b"{")
    state = state_of(0)
    with manager_of(root, state) as manager:
        manager.restore()
        assert says(state, 3)
        with pytest.raises(FormatError, match="repair"):
            manager.save(4, block=True)
        repair(LocalStorage(root), timeout_s=0)
        manager.save(4, block=True)
    record = read_head(LocalStorage(root)).record
    assert record is not None
    assert [entry.step for entry in record.checkpoints] == [1, 2, 3, 4]


def test_a_mismatch_touches_nothing(root: Path) -> None:
    """Where one tensor of many has another shape, no byte of any live object is changed, and saving is allowed."""
    state = state_of(7)
    state["weights"] = torch.full((65,), 7.0)
    before = [state["weights"].clone(), state["moments"]["mean"].clone()]
    with manager_of(root, state) as manager:
        for which in ("latest", 2):
            with pytest.raises(StateMismatch, match="weights") as caught:
                manager.restore(which)
            assert caught.value.differences
        after = [state["weights"], state["moments"]["mean"]]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert state["moments"]["count"] == 7
        manager.save(4, block=True)
