"""Deleting: exactly what no record lists or borrows, and nothing of anybody else."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import torch

from ckptman import CheckpointManager, keep
from ckptman.format.catalog import Entry
from ckptman.repository.head import read_head
from ckptman.repository.ownership import take
from ckptman.repository.sweep import garbage, sweep_attempts, unlisted
from ckptman.storage.base import StorageError
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage


def entry(step: int, *, epoch: int = 1, borrows: tuple[str, ...] = ()) -> Entry:
    return Entry(
        step=step,
        attempt=attempt(step, epoch),
        manifest="0" * 64,
        after=step,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        nbytes=0,
        new_nbytes=0,
        world_size=1,
        components=(),
        borrows=borrows,
    )


def attempt(step: int, epoch: int = 1) -> str:
    return f"step-{step:012d}.w{epoch:04d}.{step:08x}"


def put(storage: MemoryStorage, name: str) -> None:
    for key in ("manifest.json", "model.safetensors", "optimizer.safetensors"):
        storage.create(f"{name}/{key}", b"x" * 10)


def keys(storage: MemoryStorage) -> set[str]:
    return {stored.key for folder in storage.folders() if folder != "catalog" for stored in storage.listing(folder)}


def test_borrowed_files_outlive_their_owner() -> None:
    """When the lending checkpoint is dropped, its borrowed file stays and the rest goes; then that goes too."""
    storage = MemoryStorage()
    owner = take(storage, timeout_s=0)
    lent = f"{attempt(1)}/model.safetensors"
    for step in (1, 2):
        put(storage, attempt(step))
    owner.commit(lambda entries: (entry(1), entry(2, borrows=(lent,))), "save")
    owner.commit(lambda entries: entries[1:], "drop 1")
    assert keys(storage) == {
        lent,
        *(f"{attempt(2)}/{n}" for n in ("manifest.json", "model.safetensors", "optimizer.safetensors")),
    }
    owner.commit(lambda entries: (), "drop 2")
    assert keys(storage) == set()


def test_only_attempts_of_older_epochs_are_garbage() -> None:
    """An unlisted attempt of our own epoch, or of a newer one, may be somebody's save in flight."""
    storage = MemoryStorage()
    take(storage, timeout_s=0)
    owner = take(storage, timeout_s=0)
    assert owner.writer.epoch == 2
    for epoch in (1, 2, 3):
        put(storage, attempt(epoch, epoch))
    record = read_head(storage).record
    assert record is not None
    assert unlisted(storage, record) == [attempt(1, 1)]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Foreign files in the root and in an attempt's folder survive pruning, deleting and the next writer."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, keep=keep.last(1)) as manager:
        manager.save(1, block=True)
        (first,) = tmp_path.glob("step-*")
        foreign = [
            tmp_path / "notes.txt",
            tmp_path / "step-final",
            first / "notes.txt",
            tmp_path / "tensorboard" / "log",
        ]
        for path in foreign:
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        manager.save(2, block=True)
        manager.delete(2)
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
        manager.save(3, block=True)
    assert all(path.read_text() == "mine" for path in foreign)
    assert [p.name for p in first.iterdir()] == ["notes.txt"]


def test_the_manifest_goes_first() -> None:
    """A sweep that is cut short never leaves what looks complete."""
    deleted: list[str] = []

    class Watched(MemoryStorage):
        def delete(self, keys):  # type: ignore[no-untyped-def]
            deleted.extend(keys := list(keys))
            super().delete(keys)

    storage = Watched()
    owner = take(storage, timeout_s=0)
    put(storage, attempt(1))
    deleted.clear()
    assert sum(stored.nbytes for stored in garbage(storage, (), [attempt(1)])) == 30
    sweep_attempts(storage, owner.newest, [attempt(1)])
    assert deleted[0].endswith("/manifest.json")
    assert len(deleted) == 3


def test_a_storage_that_cannot_delete_fails_no_commit() -> None:
    """The commit stands, and the next writer sweeps."""

    class Stubborn(MemoryStorage):
        refuses = True

        def delete(self, keys):  # type: ignore[no-untyped-def]
            if self.refuses:
                raise StorageError("not now")
            super().delete(keys)

    storage = Stubborn()
    x = torch.ones(1)
    with CheckpointManager(storage, {"x": x}, keep=keep.last(1)) as manager:
        for step in (1, 2):
            manager.save(step, block=True)
        assert [c.step for c in manager.checkpoints()] == [2]
        assert len(storage.folders()) == 3
    storage.refuses = False
    with CheckpointManager(storage, {"x": x}, keep=keep.last(1)) as manager:
        manager.save(3, block=True)
    assert len(storage.folders()) == 2


@pytest.mark.parametrize("bad", ["step-1", "step-000000000001", "step-000000000001.w0001.zzzzzzzz", "catalog"])
def test_folders_that_only_look_alike_are_no_attempts(bad: str) -> None:
    """Only exact names of attempts are ever candidates."""
    storage = MemoryStorage()
    take(storage, timeout_s=0)
    storage.create(f"{bad}/manifest.json", b"x")
    owner = take(storage, timeout_s=0)
    assert f"{bad}/manifest.json" in {s.key for s in storage.listing(bad)}
    assert msgspec.structs.asdict(owner.newest)["number"] == 2


def test_a_checkpoint_may_only_borrow_what_another_one_needs() -> None:
    """A file of an attempt that no record lists, and that no entry borrows, may be swept: such a commit is refused."""
    from ckptman.errors import StorageError
    from ckptman.format.catalog import Entry
    from ckptman.format.names import Attempt
    from ckptman.repository.changes import with_checkpoint
    from ckptman.repository.commit import utc_now
    from ckptman.repository.sweep import no_longer_needed

    def entry(step: int, *borrows: str) -> Entry:
        return Entry(
            step=step,
            attempt=str(Attempt(step=step, epoch=1, nonce="0" * 8)),
            manifest="0" * 64,
            after=step,
            created_at=utc_now(),
            nbytes=1,
            new_nbytes=1,
            world_size=1,
            components=(),
            borrows=borrows,
        )

    base, gone = entry(1), entry(0)
    file, lost = f"{base.attempt}/m.safetensors", f"{gone.attempt}/m.safetensors"
    borrower = entry(2, file)
    assert with_checkpoint([base], borrower) == [base, borrower]
    assert with_checkpoint([borrower], entry(3, file))[-1].step == 3  # the lender was dropped, its file is still lent
    with pytest.raises(StorageError, match="no checkpoint needs"):
        with_checkpoint([base, borrower], entry(3, lost))
    assert no_longer_needed([base, borrower], [borrower]) == [base.attempt]
    assert no_longer_needed([borrower], []) == sorted([base.attempt, borrower.attempt])
    assert no_longer_needed([borrower], [borrower]) == []


def test_half_a_marker_goes_with_the_next_writer(tmp_path: Path) -> None:
    """A kill while the root is made may leave a temporary file beside the marker. What is called otherwise stays."""
    take(LocalStorage(tmp_path), timeout_s=0).release()
    for name in (".tmp-0123456789abcdef", ".tmp-mine", "notes.txt"):
        (tmp_path / name).write_bytes(b"half")
    take(LocalStorage(tmp_path), timeout_s=0).release()
    found = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert found - {"ckptman.json", "writer.lock"} == {".tmp-mine", "notes.txt"}
