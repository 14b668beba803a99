"""Copying between roots: every byte checked, whole checkpoints only, in order, once, and again after any accident."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from ckptman import CheckpointManager, keep
from ckptman.errors import CkptmanError, Fenced, IntegrityError, StorageError
from ckptman.format.catalog import Entry
from ckptman.pipeline.copying import Copied, Copying, begin
from ckptman.repository import ownership
from ckptman.repository.counterparts import identity, missing
from ckptman.repository.ownership import take
from ckptman.repository.repair import repair
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.base import Storage
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage
from ckptman.testing.faults import Fault, FaultySystem, Killed, Moment, die, fail
from ckptman.testing.power_loss import RecordingSystem, crash_states

FROZEN_NBYTES = 5 << 18
STEPS = (10, 20, 30)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 (tagged), 20 and 30, each with weights of its own; the frozen base is written by step 10 only."""
    root = tmp_path_factory.mktemp("copying") / "source"
    torch.manual_seed(0)
    frozen, weights = torch.rand(FROZEN_NBYTES // 4), torch.rand(1000)
    with CheckpointManager(root, {"frozen": {"f": frozen}, "model": {"w": weights}}, rng=False) as manager:
        for step in STEPS:
            weights += 1
            manager.save(step, metrics={"loss": 1 / step}, tags=("first",) if step == 10 else (), block=True)
    return root


@pytest.fixture
def source(made: Path, scratch: Path) -> LocalStorage:
    return LocalStorage(shutil.copytree(made, scratch / "source"))


def entries(storage: Storage) -> tuple[Entry, ...]:
    return Repository(storage).entries()


def copy_all(source: Storage, target: Storage) -> list[Copied]:
    """What ``ckptman cp`` does."""
    copying = begin(source, target, timeout_s=0)
    try:
        copied = [copying.copy(entry, entries(source)) for entry in entries(source)]
        copying.tidy()
    finally:
        copying.release()
    return copied


def steps(storage: Storage) -> list[int]:
    return [entry.step for entry in entries(storage)]


def assert_intact(storage: Storage) -> None:
    for entry in entries(storage):
        assert verify(Repository(storage), entry) == []


def weights_of(storage: Storage, step: int) -> tuple[float, float]:
    frozen, weights = torch.zeros(FROZEN_NBYTES // 4), torch.zeros(1000)
    with CheckpointManager(storage, {"frozen": {"f": frozen}, "model": {"w": weights}}, rng=False) as manager:
        manager.restore(step)
    return float(frozen.sum()), float(weights.sum())


def data_files(storage: Storage) -> list[str]:
    found = [stored.key for folder in storage.folders() for stored in storage.listing(folder)]
    return [key for key in found if key.endswith(".safetensors")]


def folder_of(root: Path, step: int) -> Path:
    (folder,) = root.glob(f"step-{step:012d}.*")
    return folder


# what arrives


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_whole_root_arrives(source: LocalStorage, scratch: Path, kind: str) -> None:
    """In order, with metrics, tags and times, every byte right and restorable; a lent file is sent once."""
    target: Storage = LocalStorage(scratch / "new" / "target") if kind == "local" else MemoryStorage()
    copied = copy_all(source, target)
    assert [one.is_new for one in copied] == [True] * 3
    assert [(e.step, e.created_at, e.metrics, e.tags, e.nbytes) for e in entries(target)] == [
        (e.step, e.created_at, e.metrics, e.tags, e.nbytes) for e in entries(source)
    ]
    assert_intact(target)
    for step in STEPS:
        assert weights_of(target, step) == weights_of(source, step)
    assert len(data_files(target)) == 4
    assert copied[0].sent_nbytes > FROZEN_NBYTES > copied[1].sent_nbytes + copied[2].sent_nbytes


def test_a_copy_belongs_to_its_root(source: LocalStorage, scratch: Path) -> None:
    """Folders carry the epoch of the destination's writer, manifests its id: repair rebuilds it like any other root."""
    root = scratch / "target"
    target = LocalStorage(root)
    take(target, timeout_s=0).release()
    copy_all(source, target)
    assert {entry.attempt.split(".")[1] for entry in entries(target)} == {"w0002"}
    manifests = [Repository(target).manifest(entry) for entry in entries(target)]
    assert len({manifest.root for manifest in manifests}) == 1
    before = entries(target)
    shutil.rmtree(root / "catalog")
    repair(target, timeout_s=0)
    assert [entry.attempt for entry in entries(target)] == [entry.attempt for entry in before]


def test_a_second_time_sends_nothing(source: LocalStorage) -> None:
    """What is there is there: also as a copy of a copy."""
    target, third = MemoryStorage(), MemoryStorage()
    copy_all(source, target)
    assert [(one.is_new, one.sent_nbytes) for one in copy_all(source, target)] == [(False, 0)] * 3
    copy_all(target, third)
    assert missing(entries(source), entries(third)) == []


def test_an_older_checkpoint_takes_its_place(source: LocalStorage) -> None:
    """It does not become the latest of a root that has newer ones of the same source, also after a repair."""
    target = MemoryStorage()
    copying = begin(source, target, timeout_s=0)
    for step in (20, 30, 10):
        copying.copy(next(e for e in entries(source) if e.step == step), entries(source))
    copying.release()
    assert steps(target) == [10, 20, 30]
    assert len(data_files(target)) == 4, "and what only the newer one had lent so far is not sent again"
    assert_intact(target)
    target.delete([stored.key for stored in target.listing("catalog")])
    repair(target, timeout_s=0)
    assert steps(target) == [10, 20, 30]


def test_a_file_whose_owner_stays_behind_is_lent_all_the_same(source: LocalStorage) -> None:
    """Its folder has no manifest; it goes with its last borrower."""
    target = MemoryStorage()
    copying = begin(source, target, timeout_s=0)
    for entry in entries(source)[1:]:
        copying.copy(entry, entries(source))
    copying.release()
    assert_intact(target)
    assert len(data_files(target)) == 3
    with CheckpointManager(target, {}) as manager:
        manager.delete(20)
        assert_intact(target)
        manager.delete(30)
    assert data_files(target) == []


def test_another_checkpoint_at_the_step_stays_unless_replaced(source: LocalStorage) -> None:
    """Refused before a byte is sent; with replace, it takes the old one's place in one commit, and adds its tags."""
    target = MemoryStorage()
    with CheckpointManager(target, {"x": torch.ones(1)}) as manager:
        manager.save(10, tags=["mine"], block=True)
    copying = begin(source, target, timeout_s=0)
    first = entries(source)[0]
    before = data_files(target)
    with pytest.raises(StorageError, match="step 10"):
        copying.copy(first, entries(source))
    assert data_files(target) == before
    copying.copy(first, entries(source), replace=True)
    copying.release()
    assert [identity(entry) for entry in entries(target)] == [identity(first)]
    assert set(entries(target)[0].tags) == {"mine", "first"}
    assert_intact(target)


def test_new_tags_follow(source: LocalStorage) -> None:
    """A tag given at the source later is added at the destination, and moves there too."""
    target = MemoryStorage()
    copy_all(source, target)
    with CheckpointManager(source, {}) as manager:
        manager.tag(30, "first")
    copy_all(source, target)
    assert [entry.tags for entry in entries(target)] == [(), (), ("first",)]


def test_keep_rules_of_the_destination(source: LocalStorage) -> None:
    """Dropped in the same commit, and said; what a kept one borrows stays."""
    target = MemoryStorage()
    copying = begin(source, target, timeout_s=0)
    dropped = [copying.copy(e, entries(source), keep=keep.last(1)).dropped for e in entries(source)]
    copying.release()
    assert dropped == [(), (), (20,)]
    assert steps(target) == [10, 30], "the first one has a tag"
    assert_intact(target)


# damage


def test_damage_is_never_copied(source: LocalStorage, scratch: Path) -> None:
    """A bit flipped at either end or in the middle of any file: named, nothing listed, nothing left under the key."""
    root = Path(source.url)
    points = 0
    for path in sorted(root.glob("step-000000000010.*/*")):
        whole = path.read_bytes()
        for position in (0, 9, len(whole) // 2, len(whole) - 1):
            data = bytearray(whole)
            data[position] ^= 1
            path.write_bytes(data)
            target = LocalStorage(scratch / f"target-{points}")
            copying = begin(source, target, timeout_s=0)
            with pytest.raises(IntegrityError) as caught:
                copying.copy(entries(source)[0], entries(source))
            copying.release()
            assert caught.value.file == f"{path.parent.name}/{path.name}"
            assert entries(target) == ()
            assert path.name not in [key.partition("/")[2] for key in data_files(target)]
            points += 1
        path.write_bytes(whole)
    assert points == 12


@pytest.mark.parametrize("change", ["short", "long", "gone"])
def test_a_file_of_another_size_is_damage(source: LocalStorage, change: str) -> None:
    """Cut, grown or gone."""
    path = folder_of(Path(source.url), 10) / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes(data[:-1] if change == "short" else data + b"x")
    target = MemoryStorage()
    copying = begin(source, target, timeout_s=0)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        copying.copy(entries(source)[0], entries(source))
    assert not [key for key in data_files(target) if "model" in key]


# accidents


def sent_calls(system: FaultySystem) -> list[str]:
    """The names of the data files that were begun."""
    return [Path(c.path).name for c in system.calls if c.name == "open_new" and c.path.endswith(".safetensors")]


def run(source: Storage, target: Path, fault: Fault | None) -> FaultySystem:
    system = FaultySystem(fault)
    copy_all(source, LocalStorage(target, system=system))
    return system


def forget_owner() -> None:
    """The lock of a process that died is free."""
    for owner in list(ownership._OWNERS.values()):
        owner.release()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_death_at_any_call(source: LocalStorage, scratch: Path, moment: Moment) -> None:
    """What is listed is whole and in order; the second run ends with everything, and nothing else."""
    calls = run(source, scratch / "target", None).calls
    deaths = 0
    for number in range(1, len(calls) + 1):
        target = scratch / f"target-{number}"
        try:
            run(source, target, die(number, moment=moment))
        except Killed:
            deaths += 1
        else:  # nothing came after the last call; and to remove a folder that is not empty fails by itself
            assert number == len(calls) or calls[number - 1].name == "rmdir"
        forget_owner()
        clean = LocalStorage(target)
        assert steps(clean) == list(STEPS)[: len(steps(clean))]
        assert_intact(clean)
        done = files_done(target)
        assert len(sent_calls(run(source, target, None))) == 4 - done, "none that was known to be durable"
        assert steps(clean) == list(STEPS)
        assert_intact(clean)
        assert len(data_files(clean)) == 4
        shutil.rmtree(target)
    assert deaths >= 70


def files_done(target: Path) -> int:
    """The files of a folder that are followed by another one (or by the manifest) were durable before it was begun."""
    done = 0
    for folder in target.glob("step-*"):
        names = sorted(path.name for path in folder.iterdir())
        done += max(0, len(names) - 1)
    return done


def test_an_error_at_any_call(source: LocalStorage, scratch: Path) -> None:
    """It is told, what is listed is whole, and trying again in the same session ends with everything."""
    calls = run(source, scratch / "target", None).calls
    told = 0
    for number in range(1, len(calls) + 1):
        target = scratch / f"target-{number}"
        system = FaultySystem(fail(number, errno.EIO))
        storage = LocalStorage(target, system=system)
        copying: Copying | None = None
        for _ in range(3):
            try:
                copying = copying or begin(source, storage, timeout_s=0)
                for entry in entries(source):
                    copying.copy(entry, entries(source))
                break
            except CkptmanError:
                assert_intact(LocalStorage(target))
                told += 1
        assert copying is not None
        copying.release()
        assert steps(storage) == list(STEPS)
        assert_intact(storage)
        assert len(sent_calls(system)) <= 5
        shutil.rmtree(target)
    assert told >= len(calls) // 2


def interrupted(source: Storage, target: Path, at: int = 2) -> None:
    """A copying that died when it began data file number *at*."""
    calls = run(source, target.with_name("counting"), None).calls
    shutil.rmtree(target.with_name("counting"))
    begun = [n for n, c in enumerate(calls, 1) if c.name == "open_new" and c.path.endswith(".safetensors")]
    with pytest.raises(Killed):
        run(source, target, die(begun[at - 1] + 1))
    forget_owner()


def again(source: Storage, target: Path) -> list[str]:
    return sent_calls(run(source, target, None))


def test_a_second_run_goes_on(source: LocalStorage, scratch: Path) -> None:
    """The file that was complete is pointed at; the one that was being written is not."""
    target = scratch / "target"
    interrupted(source, target)
    assert again(source, target) == ["model.safetensors"] * 3
    assert_intact(LocalStorage(target))


def test_a_third_run_goes_on_too(source: LocalStorage, scratch: Path) -> None:
    """Through two copyings that died before they sent anything more."""
    target = scratch / "target"
    interrupted(source, target)
    begin(source, LocalStorage(target), timeout_s=0)
    forget_owner()
    assert again(source, target) == ["model.safetensors"] * 3


def someone_saves(source: Storage, target: Path) -> None:
    with CheckpointManager(target, {"x": torch.ones(1)}) as manager:
        manager.save(99, block=True)


def someone_copies_and_drops(source: Storage, target: Path) -> None:
    other = MemoryStorage()
    with CheckpointManager(other, {"x": torch.ones(1)}) as manager:
        for step in (1, 2):
            manager.save(step, block=True)
    copying = begin(other, LocalStorage(target), timeout_s=0)
    for entry in entries(other):
        copying.copy(entry, entries(other), keep=keep.last(1))
    copying.release()


def a_bit_flips(source: Storage, target: Path) -> None:
    (path,) = target.glob("step-*/frozen.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def a_header_flips(source: Storage, target: Path) -> None:
    (path,) = target.glob("step-*/frozen.safetensors")
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)


def nobody_knows_whether_it_was_durable(source: Storage, target: Path) -> None:
    (path,) = target.glob("step-*/model.safetensors")
    path.unlink()


def a_record_is_damaged(source: Storage, target: Path) -> None:
    (path,) = (target / "catalog").iterdir()
    path.write_bytes(b"x" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    "between",
    [
        someone_saves,
        someone_copies_and_drops,
        a_bit_flips,
        a_header_flips,
        nobody_knows_whether_it_was_durable,
        a_record_is_damaged,
    ],
)
def test_what_is_not_safe_is_sent_again(
    source: LocalStorage, scratch: Path, between: Callable[[Storage, Path], None]
) -> None:
    """A file is not pointed at if somebody may be about to delete it, if it is not right, or may not be durable."""
    target = scratch / "target"
    interrupted(source, target)
    between(source, target)
    assert again(source, target) == ["frozen.safetensors", *["model.safetensors"] * 3]
    assert_intact(LocalStorage(target))


def test_on_a_storage_that_shows_whole_files_only_the_last_one_counts(source: LocalStorage) -> None:
    """An object store has no half-written files, so what it lists is durable."""

    class Counting(MemoryStorage):
        begun: ClassVar[list[str]] = []
        dies_at = 2

        def open_new(self, key):  # type: ignore[no-untyped-def]
            if key.endswith(".safetensors"):
                self.begun.append(key.partition("/")[2])
                if len(self.begun) == self.dies_at:
                    raise Killed
            return super().open_new(key)

    target = Counting()
    copying = begin(source, target, timeout_s=0)
    with pytest.raises(Killed):
        copying.copy(entries(source)[0], entries(source))
    copying.release()
    copy_all(source, target)
    assert target.begun == ["frozen.safetensors", "model.safetensors", *["model.safetensors"] * 3]
    assert_intact(target)


def test_no_power_loss_takes_or_tears_a_copy(tmp_path: Path) -> None:
    """Of a copying that died and one that went on with its files: whatever the disk kept, what is listed is whole."""
    source = MemoryStorage()
    with CheckpointManager(source, {"a": torch.rand(9), "b": torch.rand(9)}, rng=False) as manager:
        for step in (1, 2):
            manager.save(step, block=True)
    calls = run(source, tmp_path / "counting", None).calls
    at = next(n for n, c in enumerate(calls, 1) if c.name == "fsync" and c.path.endswith("b.safetensors"))
    recording = RecordingSystem(tmp_path)
    with pytest.raises(Killed):
        copy_all(source, LocalStorage(tmp_path / "target", system=FaultySystem(die(at), inner=recording)))
    forget_owner()
    target = LocalStorage(tmp_path / "target", system=recording)
    copying = begin(source, target, timeout_s=0)
    for entry in entries(source):
        copying.copy(entry, entries(source))
        recording.mark(str(entry.step))
    copying.tidy()
    copying.release()
    borrows = [key.partition("/")[2] for entry in entries(target) for key in entry.borrows]
    states = 0
    for state in crash_states(recording.journal, seed=0, limit_per_prefix=64):
        left = state.storage("target")
        assert_intact(left)
        assert [str(step) for step in steps(left)][: len(state.acknowledged)] == list(state.acknowledged)
        states += 1
    assert states > 150
    assert borrows == ["a.safetensors"], "it did go on with what was there, and not with what was never fsynced"


def test_a_copying_that_was_overtaken_is_fenced_and_deletes_nothing(source: LocalStorage) -> None:
    """Its successor points at what it sent; the overtaken one must leave that alone."""
    target = MemoryStorage()
    slow = begin(source, target, timeout_s=0)
    slow.copy(entries(source)[0], entries(source))
    quick = begin(source, target, timeout_s=0)
    with pytest.raises(Fenced):
        slow.copy(entries(source)[1], entries(source))
    quick.copy(entries(source)[1], entries(source))
    quick.release()
    assert steps(target) == [10, 20]
    assert_intact(target)


def test_nothing_is_swept_before_the_end(source: LocalStorage, scratch: Path) -> None:
    """At the end what is left over goes, and only after a record that tells later copyings to leave it alone."""
    target = scratch / "target"
    interrupted(source, target, at=3)
    leftover = {path.name for path in target.glob("step-*")}
    copying = begin(source, LocalStorage(target), timeout_s=0)
    assert leftover <= {path.name for path in target.glob("step-*")}
    for entry in entries(source):
        copying.copy(entry, entries(source))
    copying.tidy()
    copying.release()
    assert len(data_files(LocalStorage(target))) == 4


def test_the_same_root_is_refused(source: LocalStorage, scratch: Path) -> None:
    """Also by another name."""
    (scratch / "link").symlink_to(Path(source.url))
    with pytest.raises(ValueError, match="same root"):
        begin(source, LocalStorage(scratch / "link"), timeout_s=0)
