"""LocalStorage where nothing fails: places, links, modes, processes, and the exact order of its calls."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

import pytest

from ckptman.errors import StorageError
from ckptman.storage.base import KeyExists, KeyMissing, Stored
from ckptman.storage.local import LocalStorage
from ckptman.storage.system import System
from ckptman.testing.faults import FaultySystem

TEMPORARY = ".tmp-0123456789abcdef"


class KnownNonce(System):
    def nonce(self) -> str:
        return TEMPORARY.removeprefix(".tmp-")


class RecordedSystem(FaultySystem):
    def nonce(self) -> str:
        return TEMPORARY.removeprefix(".tmp-")


def calls_below(system: FaultySystem, base: Path) -> list[str]:
    """``name path`` of each call, with paths relative to *base*; what is above it is left out."""
    return [
        f"{call.name} {Path(call.path).relative_to(base)}"
        for call in system.calls
        if Path(call.path).is_relative_to(base)
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


# the order of calls


def test_create_makes_everything_durable_in_order(tmp_path: Path) -> None:
    """Each new directory is fsynced into its parent before anything is made in it; bytes before name before return."""
    system = RecordedSystem()
    LocalStorage(tmp_path / "new" / "root", system=system).create("f/g/a", b"value")
    assert calls_below(system, tmp_path) == [
        "mkdir new",
        "fsync_dir .",
        "mkdir new/root",
        "fsync_dir new",
        "mkdir new/root/f",
        "mkdir new/root/f/g",
        "fsync_dir new/root",
        "fsync_dir new/root/f",
        f"open_new new/root/f/g/{TEMPORARY}",
        f"write new/root/f/g/{TEMPORARY}",
        f"fsync new/root/f/g/{TEMPORARY}",
        f"close new/root/f/g/{TEMPORARY}",
        "link new/root/f/g/a",
        "fsync_dir new/root/f/g",
        f"unlink new/root/f/g/{TEMPORARY}",
    ]


def test_directories_above_the_root_are_fsynced_once(root: Path) -> None:
    """Whoever made them may not have fsynced them; a second create does not do it again."""
    root.mkdir()
    system = RecordedSystem()
    storage = LocalStorage(root, system=system)
    storage.create("f/a", b"")
    above = [Path(call.path) for call in system.calls if call.name == "fsync_dir" and root.is_relative_to(call.path)]
    device = root.stat().st_dev
    assert [path for path in above if path != root] == [path for path in root.parents if path.stat().st_dev == device]
    before = len(system.calls)
    storage.create("f/b", b"")
    assert [call.name for call in system.calls[before:]] == [
        "open_new",
        "fsync",
        "close",
        "link",
        "fsync_dir",
        "unlink",
    ]


def test_create_makes_a_folder_durable_that_another_process_left(root: Path) -> None:
    """The maker of the folder may have been killed before it fsynced the root: the next create does."""
    (root / "f").mkdir(parents=True)
    system = RecordedSystem()
    LocalStorage(root, system=system).create("f/a", b"")
    assert "fsync_dir ." in calls_below(system, root)


def test_streaming_makes_everything_durable_in_order(root: Path) -> None:
    """The bytes when commit returns, the names when persist returns, in the order that was asked for."""
    root.mkdir()
    system = RecordedSystem()
    storage = LocalStorage(root, system=system)
    with storage.open_new("f/a") as file:
        file.write(b"one")
        file.write(b"two")
    storage.persist(["f", ""])
    assert calls_below(system, root) == [
        "mkdir f",
        "open_new f/a",
        "write f/a",
        "write f/a",
        "fsync f/a",
        "close f/a",
        "fsync_dir f",
        "fsync_dir .",
    ]


def test_reading_changes_nothing(root: Path) -> None:
    """No read makes a single call that changes the disk, not even for a root that is not there."""
    system = RecordedSystem()
    storage = LocalStorage(root, system=system)
    assert storage.listing("") == storage.folders() == []
    with pytest.raises(KeyMissing):
        storage.read("f/a", limit=1)
    LocalStorage(root).create("f/a", b"x")
    assert storage.read("f/a", limit=1) == b"x"
    assert storage.size("f/a") == len(storage.listing("")) == 1
    assert system.calls == []


# places


def test_a_relative_root_does_not_follow_a_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the directory that it named when the storage was made."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("runs/a")
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.create("key", b"x")
    assert (tmp_path / "runs" / "a" / "key").read_bytes() == b"x"
    assert storage.url == str(tmp_path / "runs" / "a")
    assert storage.lock_path == tmp_path / "runs" / "a" / "writer.lock"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` is the user's home, and never a directory of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LocalStorage("~/runs").url == str(tmp_path / "runs")
    with pytest.raises(ValueError, match="no-such-user"):
        LocalStorage("~no-such-user-here/runs")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_impossible_roots(path: str) -> None:
    """A plain ValueError, before any I/O."""
    with pytest.raises(ValueError, match="no path"):
        LocalStorage(path)
    with pytest.raises(TypeError, match="bytes"):
        LocalStorage(os.fsencode(path or "x"))  # type: ignore[arg-type]


def test_a_root_may_be_a_symbolic_link(tmp_path: Path) -> None:
    """It is the same root under both names, and stays where it pointed when the storage was made."""
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    storage = LocalStorage(link)
    assert storage.identity == LocalStorage(real).identity != LocalStorage(tmp_path).identity
    assert storage.lock_path == LocalStorage(real).lock_path
    link.unlink()
    link.symlink_to(tmp_path)
    storage.create("f/a", b"x")
    assert LocalStorage(real).read("f/a", limit=1) == b"x"


@pytest.mark.parametrize("below", ["", "deeper/down"])
def test_a_root_that_is_a_file_is_a_storage_error(tmp_path: Path, below: str) -> None:
    """Reading and writing say so; the file stays as it is."""
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    storage = LocalStorage(file / below)
    for call in (
        lambda: storage.create("a", b"x"),
        lambda: storage.open_new("f/a"),
        lambda: storage.read("a", limit=9),
        lambda: storage.listing(""),
        storage.folders,
        lambda: storage.delete(["a"]),
    ):
        with pytest.raises(StorageError, match="is the root itself a file"):
            call()
    assert file.read_bytes() == b"mine"


def test_the_root_is_the_only_folder_that_is_not_removed_when_empty(root: Path) -> None:
    """Deleting the last key leaves an empty root."""
    storage = LocalStorage(root)
    storage.create("a", b"")
    storage.create("f/g/b", b"")
    storage.delete(["a", "f/g/b"])
    assert root.is_dir()
    assert not list(root.iterdir())


@pytest.mark.parametrize(("removed_by", "made_by"), [("us", "us"), ("us", "another"), ("another", "us")])
def test_a_folder_that_was_deleted_is_made_durable_again(root: Path, removed_by: str, made_by: str) -> None:
    """Where this process removed it or made it anew, the next create fsyncs the root again."""
    system = RecordedSystem()
    storage = LocalStorage(root, system=system)
    storage.create("f/a", b"")
    (storage if removed_by == "us" else LocalStorage(root)).delete(["f/a"])
    if made_by == "another":
        (root / "f").mkdir()
    before = len(system.calls)
    storage.create("f/a", b"")
    names = [call.name for call in system.calls[before:]]
    assert names[: names.index("open_new")] == (["fsync_dir"] if made_by == "another" else ["mkdir", "fsync_dir"])


# what other people put there


def test_symbolic_links_below_the_root_are_refused(root: Path, tmp_path: Path) -> None:
    """As a folder and as a file, dangling or not: refused by name when read or written, left out of listings."""
    outside = tmp_path / "outside"
    LocalStorage(outside).create("secret", b"secret")
    storage = LocalStorage(root)
    storage.create("f/a", b"x")
    (root / "folder").symlink_to(outside)
    (root / "f" / "file").symlink_to(outside / "secret")
    (root / "f" / "dangling").symlink_to(outside / "new")
    for call in (
        lambda: storage.read("folder/secret", limit=9),
        lambda: storage.size("folder/secret"),
        lambda: storage.read_into("folder/secret", 0, memoryview(bytearray(6))),
        lambda: storage.create("folder/new", b"x"),
        lambda: storage.open_new("folder/new"),
        lambda: storage.listing("folder"),
        lambda: storage.persist(["folder"]),
        lambda: storage.delete(["folder/secret"]),
        lambda: storage.remove_temporaries("folder"),
        lambda: storage.read("f/file", limit=9),
        lambda: storage.size("f/file"),
        lambda: storage.read("f/dangling", limit=9),
    ):
        with pytest.raises(StorageError, match="symbolic link") as caught:
            call()
        assert not isinstance(caught.value, (KeyMissing, KeyExists))
    for key in ("f/file", "f/dangling"):
        with pytest.raises(KeyExists):
            storage.create(key, b"x")
        with pytest.raises(KeyExists):
            storage.open_new(key)
    assert storage.listing("") == [Stored(key="f/a", nbytes=1)]
    assert storage.folders() == ["f"]
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_deleting_a_symbolic_link_leaves_its_target(root: Path, tmp_path: Path) -> None:
    """Delete removes the name in the root, never what it points to."""
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    storage = LocalStorage(root)
    storage.create("f/a", b"x")
    (root / "f" / "link").symlink_to(target)
    storage.delete(["f/link"])
    assert [path.name for path in (root / "f").iterdir()] == ["a"]
    assert target.read_bytes() == b"mine"


def test_what_is_no_regular_file_is_refused(root: Path) -> None:
    """A FIFO does not make a reader wait, and neither it nor a directory is read as a value or listed as one."""
    storage = LocalStorage(root)
    storage.create("f/a", b"x")
    os.mkfifo(root / "f" / "fifo")
    (root / "f" / "folder").mkdir()
    for key in ("f/fifo", "f/folder"):
        for call in (lambda key=key: storage.read(key, limit=9), lambda key=key: storage.size(key)):
            with pytest.raises(StorageError) as caught:
                call()
            assert not isinstance(caught.value, KeyMissing)
        with pytest.raises(KeyExists):
            storage.create(key, b"x")
    assert storage.listing("f") == [Stored(key="f/a", nbytes=1)]
    with pytest.raises(StorageError):
        storage.delete(["f/folder"])


def test_foreign_names_are_neither_listed_nor_removed(root: Path) -> None:
    """A name that no key can have does not exist for us: hidden files, odd characters, our own temporary files."""
    storage = LocalStorage(root)
    storage.create("f/a", b"x")
    names = [".hidden", "a b:c", "nul", "trailing.", "\udcff\udcfe", TEMPORARY, ".tmp-notours"]
    for name in names:
        Path(root, "f", name).write_bytes(b"")
    (root / ".git").mkdir()
    assert storage.listing("") == [Stored(key="f/a", nbytes=1)]
    assert storage.folders() == ["f"]
    storage.delete(["f/a"])
    storage.remove_temporaries("f")
    assert sorted(path.name for path in (root / "f").iterdir()) == sorted(set(names) - {TEMPORARY})


def test_modes_follow_the_umask(root: Path) -> None:
    """Files and folders are as open as the user's other ones, by either way of writing."""
    before = os.umask(0o027)
    try:
        storage = LocalStorage(root)
        storage.create("f/a", b"x")
        with storage.open_new("g/b"):
            pass
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE((root / path).stat().st_mode) for path in (".", "f", "g", "f/a", "g/b")}
    assert modes == {".": 0o750, "f": 0o750, "g": 0o750, "f/a": 0o640, "g/b": 0o640}


# temporary files


def test_temporary_files_of_the_dead_are_removed(root: Path) -> None:
    """And so is the folder, if nothing else is in it; a folder with keys stays, one that is missing is no error."""
    storage = LocalStorage(root)
    storage.create("f/a", b"x")
    for folder in ("f", "g"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / TEMPORARY).write_bytes(b"half")
        storage.remove_temporaries(folder)
    storage.remove_temporaries("h")
    storage.remove_temporaries("")
    assert [path.name for path in root.iterdir()] == ["f"]
    assert [path.name for path in (root / "f").iterdir()] == ["a"]


def test_a_sleeper_whose_temporary_file_was_swept_commits_nothing(root: Path) -> None:
    """A sweep between its close and its link makes ``create`` a StorageError, and there is no key."""

    class Sleeper(System):
        def link(self, source: str, target: str) -> None:
            LocalStorage(root).remove_temporaries("f")
            super().link(source, target)

    with pytest.raises(StorageError, match="removed meanwhile") as caught:
        LocalStorage(root, system=Sleeper()).create("f/a", b"x")
    assert not isinstance(caught.value, (KeyMissing, KeyExists))
    assert LocalStorage(root).listing("") == []


# reading while others write


def test_short_reads_are_continued(root: Path) -> None:
    """A system that gives three bytes at a time still gives them all."""

    class Slow(System):
        def read_into(self, file: FileIO, start: int, into: memoryview) -> int:
            return super().read_into(file, start, into[:3])

    LocalStorage(root).create("a", bytes(range(100)))
    storage = LocalStorage(root, system=Slow())
    assert storage.read("a", limit=100) == bytes(range(100))
    into = bytearray(50)
    assert storage.read_into("a", 70, memoryview(into)) == 30
    assert into[:30] == bytes(range(70, 100))


def test_what_vanishes_during_a_listing_is_left_out(root: Path) -> None:
    """A file or a whole folder that is deleted between the scan and the look at it is no error."""

    class Vanishing(System):
        def scan(self, path: str) -> list[os.DirEntry[str]]:
            entries = super().scan(path)
            if path == str(root):
                LocalStorage(root).delete(["f/a", "gone"])
            return entries

    storage = LocalStorage(root)
    for key in ("f/a", "gone", "here"):
        storage.create(key, b"x")
    assert LocalStorage(root, system=Vanishing()).listing("") == [Stored(key="here", nbytes=1)]


def test_a_file_that_shrinks_is_read_as_far_as_it_goes(root: Path) -> None:
    """The bytes that are there are returned, and no more: a digest will tell."""

    class Shrinking(System):
        def read_into(self, file: FileIO, start: int, into: memoryview) -> int:
            os.truncate(root / "a", 4)
            return super().read_into(file, start, into)

    LocalStorage(root).create("a", b"0123456789")
    assert LocalStorage(root, system=Shrinking()).read("a", limit=10) == b"0123"


# processes


@pytest.fixture
def storage_before_fork(root: Path) -> LocalStorage:
    storage = LocalStorage(root)
    storage.create("f/parent", b"x")
    return storage


def test_a_storage_works_after_a_fork(storage_before_fork: LocalStorage) -> None:
    """Parent and child both go on with the same object, and see what the other did."""
    child = os.fork()
    if child == 0:
        try:
            storage_before_fork.create("f/child", storage_before_fork.read("f/parent", limit=9))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert storage_before_fork.read("f/child", limit=9) == b"x"
