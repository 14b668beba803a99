"""LocalStorage on NFS, as `ckptman.testing.nfs` models it: stale names and handles, late errors, lost answers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ckptman import CheckpointManager, SaveFailed, StorageError, keep
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.base import KeyExists, KeyMissing, Storage
from ckptman.storage.local import LocalStorage
from ckptman.testing.contracts import StorageContract
from ckptman.testing.faults import FaultySystem, fail
from ckptman.testing.nfs import LOSSY, NfsClient


class TestTheContractOverNfs(StorageContract):
    """A client alone keeps every promise of a storage, also one whose every answer is lost."""

    @pytest.fixture(params=[(), LOSSY], ids=["answers", "lost answers"])
    def storage(self, request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "root", system=NfsClient(loses=request.param))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "above" / "root"


# names that were looked up before they existed

LOOKS: dict[str, Callable[[LocalStorage], object]] = {
    "read": lambda storage: storage.read("f/a", limit=9),
    "size": lambda storage: storage.size("f/a"),
    "read_into": lambda storage: storage.read_into("f/a", 0, memoryview(bytearray(9))),
    "listing": lambda storage: storage.listing("f"),
    "listing all": lambda storage: storage.listing(""),
    "folders": lambda storage: storage.folders(),
    "modified_at": lambda storage: storage.modified_at("f/a"),
}


@pytest.mark.parametrize("before", ["no root", "no folder", "no file"])
@pytest.mark.parametrize("name", LOOKS)
def test_what_another_client_made_is_seen_at_once(root: Path, name: str, before: str) -> None:
    """Though this one looked for it before, and its client remembers that it was not there."""
    here, there = (LocalStorage(root, system=NfsClient()) for _ in range(2))
    if before != "no root":
        there.create("other" if before == "no folder" else "f/other", b"")
    for look in LOOKS.values():
        with suppress(KeyMissing):
            look(here)
    there.create("f/a", b"value")
    seen = LOOKS[name](here)
    assert seen == LOOKS[name](LocalStorage(root))
    assert seen


def test_what_is_not_there_is_missing(root: Path) -> None:
    """Looking twice does not make it so."""
    storage = LocalStorage(root, system=NfsClient())
    for key in ("a", "f/a"):
        with pytest.raises(KeyMissing):
            storage.read(key, limit=9)
    assert storage.listing("f") == []
    storage.create("f/a", b"x")
    storage.delete(["f/a"])
    with pytest.raises(KeyMissing):
        storage.read("f/a", limit=9)


def test_a_folder_above_that_may_not_be_read_is_no_error(root: Path) -> None:
    """Where the name of the root cannot be listed, what the client says is believed."""
    root.mkdir(parents=True)
    storage = LocalStorage(root, system=FaultySystem(fail(1, errno.EACCES, name="scan", lasting=True)))
    with pytest.raises(KeyMissing):
        storage.read("a", limit=9)


def test_a_symbolic_link_that_came_late_is_not_followed(root: Path) -> None:
    """The folder was missing, then it is a link: the second look refuses it as the first would have."""
    (root.parent / "elsewhere").mkdir(parents=True)
    (root.parent / "elsewhere" / "a").write_bytes(b"x")
    root.mkdir()
    storage = LocalStorage(root, system=NfsClient())
    with pytest.raises(KeyMissing):
        storage.read("f/a", limit=9)
    (root / "f").symlink_to(root.parent / "elsewhere")
    with pytest.raises(StorageError, match="symbolic link"):
        storage.read("f/a", limit=9)
    with pytest.raises(StorageError, match="symbolic link"):
        storage.listing("f")


def test_a_reader_on_another_client_sees_every_commit(root: Path) -> None:
    """From before the root exists: the latest is that of the last save, and it restores."""
    x, y = torch.zeros(3), torch.zeros(3)
    reader = CheckpointManager(LocalStorage(root, system=NfsClient()), {"x": y})
    assert reader.restore() is None
    with CheckpointManager(LocalStorage(root, system=NfsClient()), {"x": x}, keep=keep.last(2)) as writer:
        for step in range(1, 6):
            x.fill_(step)
            writer.save(step, block=True)
            latest = reader.latest()
            assert latest is not None
            assert latest.step == step
            assert reader.restore() is not None
            assert y.eq(step).all()
    reader.close()


def test_a_writer_on_another_client_takes_over(root: Path) -> None:
    """It looked at the root before that existed, and finds marker, catalog and epoch all the same."""
    second = LocalStorage(root, system=NfsClient())
    with pytest.raises(KeyMissing):
        second.read("ckptman.json", limit=99)
    with CheckpointManager(LocalStorage(root, system=NfsClient()), {"x": torch.ones(1)}) as manager:
        manager.save(1, block=True)
    with CheckpointManager(second, {"x": torch.ones(1)}) as manager:
        manager.save(2, block=True)
    record = Repository(LocalStorage(root)).head().record
    assert record is not None
    assert (record.writer.epoch, [entry.step for entry in record.checkpoints]) == (2, [1, 2])


# handles that the server does not know any more


class RemovedMeanwhile(NfsClient):
    """Another client removes the file after this one has opened it."""

    def open_read(self, path: str):  # type: ignore[no-untyped-def]
        file = super().open_read(path)
        os.unlink(path)  # noqa: PTH108
        return file


@pytest.mark.parametrize("name", ["read", "size", "read_into"])
def test_a_file_that_was_removed_while_it_was_open_is_missing(root: Path, name: str) -> None:
    """ESTALE, and no listing has it any more."""
    LocalStorage(root).create("f/a", b"x")
    with pytest.raises(KeyMissing):
        LOOKS[name](LocalStorage(root, system=RemovedMeanwhile()))


@pytest.mark.parametrize("call", ["open_read", "fstat", "read_into", "lstat", "scan"])
@pytest.mark.parametrize("name", ["read", "size", "read_into", "listing", "folders"])
def test_a_handle_that_was_stale_once_is_asked_for_again(root: Path, name: str, call: str) -> None:
    """The file is still there: neither missing nor an error."""
    LocalStorage(root).create("f/a", b"value")
    storage = LocalStorage(root, system=FaultySystem(fail(1, errno.ESTALE, name=call)))
    assert LOOKS[name](storage) == LOOKS[name](LocalStorage(root))


@pytest.mark.parametrize("name", LOOKS)
def test_a_server_that_forgot_all_handles_is_a_failure(root: Path, name: str) -> None:
    """Never "missing": a reader would take the checkpoint for damaged, or the root for new."""
    client = NfsClient()
    storage = LocalStorage(root, system=client)
    storage.create("f/a", b"value")
    client.is_stale = True
    with pytest.raises(StorageError, match="mount") as caught:
        LOOKS[name](storage)
    assert type(caught.value) is StorageError
    assert caught.value.errno == errno.ESTALE
    client.is_stale = False
    assert LOOKS[name](storage)


def test_a_folder_that_vanishes_while_it_is_listed_is_empty(root: Path) -> None:
    """Removed by another client between its name and its names."""

    class Vanishing(NfsClient):
        def scan(self, path: str):  # type: ignore[no-untyped-def]
            if path.endswith("/f") and Path(path).exists():
                (Path(path) / "a").unlink()
                Path(path).rmdir()
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().scan(path)

    LocalStorage(root).create("f/a", b"x")
    storage = LocalStorage(root, system=Vanishing())
    assert storage.listing("f") == []
    assert storage.listing("") == []


# errors that come late


def create(storage: LocalStorage) -> None:
    storage.create("f/new", bytes(600))


def stream(storage: LocalStorage) -> None:
    with storage.open_new("f/new") as file:
        for _ in range(6):
            file.write(bytes(100))


@pytest.mark.parametrize("way", [create, stream])
@pytest.mark.parametrize("full_at", ["fsync", "close"])
def test_a_full_server_is_noticed_though_every_write_succeeded(
    root: Path, way: Callable[[LocalStorage], None], full_at: str
) -> None:
    """At fsync or only at close: an error with its reason, no key, and the room is free again."""
    client = NfsClient(room=500, full_at=full_at)  # type: ignore[arg-type]
    storage = LocalStorage(root, system=client)
    with pytest.raises(StorageError, match="full") as caught:
        way(storage)
    assert caught.value.errno == errno.ENOSPC
    assert storage.listing("") == []
    assert client.free_nbytes == 500
    storage.create("f/small", bytes(100))


@pytest.mark.parametrize("full_at", ["fsync", "close"])
def test_a_save_that_does_not_fit_fails_and_harms_nothing(root: Path, full_at: str) -> None:
    """No checkpoint of it is listed, the one before is intact, and a smaller one can be saved."""
    client = NfsClient(room=200_000, full_at=full_at)  # type: ignore[arg-type]
    storage = LocalStorage(root, system=client)
    state: dict[str, object] = {"x": torch.rand(10_000)}
    with CheckpointManager(storage, state) as manager:
        manager.save(1, block=True)
    state["x"] = torch.rand(100_000)
    with CheckpointManager(storage, state) as manager, pytest.raises(SaveFailed, match="full"):
        manager.save(2, block=True)
    state["x"] = torch.rand(10_000)
    with CheckpointManager(storage, state) as manager:
        manager.save(3, block=True)
    entries = Repository(LocalStorage(root)).entries()
    assert [entry.step for entry in entries] == [1, 3]
    assert [verify(Repository(LocalStorage(root)), entry) for entry in entries] == [[], []]


# answers that are lost


def test_a_link_whose_answer_was_lost_is_ours_and_another_one_is_not(root: Path) -> None:
    """Both times the server says that the name is taken."""
    storage = LocalStorage(root, system=NfsClient(loses=["link"]))
    storage.create("f/a", b"ours")
    with pytest.raises(KeyExists):
        storage.create("f/a", b"other")
    assert storage.read("f/a", limit=9) == b"ours"
    assert [path.name for path in (root / "f").iterdir()] == ["a"]


def test_a_whole_run_whose_every_answer_is_lost(root: Path) -> None:
    """Saves, prunes, tags, deletes and a takeover: all is as it should be, and nothing lies about."""
    x = torch.zeros(3)
    for first in (1, 4):
        storage = LocalStorage(root, system=NfsClient(loses=LOSSY))
        with CheckpointManager(storage, {"x": x}, keep=keep.last(2)) as manager:
            for step in range(first, first + 3):
                manager.save(step, block=True)
            manager.tag(first + 1, f"t{first}")
            manager.delete(first + 2)
    entries = Repository(LocalStorage(root)).entries()
    assert [(entry.step, entry.tags) for entry in entries] == [(2, ("t1",)), (5, ("t4",))]
    assert [verify(Repository(LocalStorage(root)), entry) for entry in entries] == [[], []]
    assert len(list(root.glob("step-*"))) == 2
    assert not list(root.rglob(".*"))
