"""LocalStorage where the system fails or the process dies, at every call that it makes."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptman.errors import StorageError
from ckptman.storage.base import KeyExists, KeyMissing, NotDurable, Storage
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import MOMENTS, Call, FaultySystem, Killed, Moment, die, fail, short_write, sigkill

DATA = b"0123456789"
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)


def create(storage: Storage) -> None:
    storage.create("f/new", DATA)


def stream(storage: Storage) -> None:
    with storage.open_new("f/new") as file:
        file.write(DATA[:4])
        file.write(DATA[4:])
    storage.persist(["f", ""])


WAYS = pytest.mark.parametrize("way", [create, stream])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    LocalStorage(root).create("old/a", b"old")
    return root


def calls_of(way: Callable[[Storage], None], root: Path) -> list[Call]:
    """The calls that *way* makes when nothing fails; undone again."""
    system = FaultySystem()
    way(LocalStorage(root, system=system))
    LocalStorage(root).delete(["f/new"])
    return system.calls


def is_best_effort(call: Call, root: Path) -> bool:
    """Of directories above the root, and of temporary files that are no longer needed, failure is not an error."""
    above = call.name == "fsync_dir" and not Path(call.path).is_relative_to(root)
    return above or (call.name == "unlink" and ".tmp-" in call.path)


def error_of(way: Callable[[Storage], None], storage: Storage) -> StorageError | None:
    try:
        way(storage)
    except StorageError as error:
        return error
    return None


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def clean_up(root: Path) -> None:
    storage = LocalStorage(root)
    storage.delete(["f/new", "f/next", "f/again"])
    storage.remove_temporaries("f")


@WAYS
@pytest.mark.parametrize("moment", ["before", "torn", "after"])
def test_an_error_at_any_call(root: Path, way: Callable[[Storage], None], moment: Moment) -> None:
    """
    Each error at each call is a StorageError with its errno. Afterwards the old key is intact, the new one is absent
    (or whole, where its name was given before the failure), no rubbish lies about, and the same storage goes on.
    """
    calls = calls_of(way, root)
    points = 0
    for number, call in enumerate(calls, start=1):
        for error in ERRORS:
            system = FaultySystem(fail(number, error, moment=moment))
            storage = LocalStorage(root, system=system)
            if is_best_effort(call, root):
                way(storage)
            else:
                with pytest.raises(StorageError, match=os.strerror(error)) as caught:
                    way(storage)
                assert caught.value.errno == error
                assert not isinstance(caught.value, (KeyExists, KeyMissing))
                assert isinstance(caught.value.__cause__, OSError)
            assert system.struck == 1, call
            clean = LocalStorage(root)
            assert clean.read("old/a", limit=3) == b"old"
            was_named = is_best_effort(call, root) or is_after_the_name(way, calls, number, moment)
            if was_named:
                assert clean.read("f/new", limit=99) == DATA, call
            elif call.name == "open_new" and moment == "after":
                pass  # an answer was lost: whether a file is there, and whose, nobody can know
            else:
                assert names_in(root / "f") == [], call
            storage.create("f/next", b"next")
            assert clean.read("f/next", limit=4) == b"next"
            clean_up(root)
            points += 1
    assert points == len(calls) * len(ERRORS) >= 50


def is_after_the_name(way: Callable[[Storage], None], calls: list[Call], number: int, moment: Moment) -> bool:
    """Whether the key is there for readers when call *number* fails: documented, since others may have read it."""
    if way is create:
        link = next(index for index, call in enumerate(calls, start=1) if call.name == "link")
        return number > link or (number == link and moment == "after")
    return number > next(index for index, call in enumerate(calls, start=1) if call.name == "close")


@WAYS
def test_a_disk_that_stays_full(root: Path, way: Callable[[Storage], None]) -> None:
    """Where every further call fails, even the cleaning up, it is one StorageError, and the old key is intact."""
    points = failures = 0
    for number in range(1, len(calls_of(way, root)) + 1):
        storage = LocalStorage(root, system=FaultySystem(fail(number, errno.ENOSPC, lasting=True)))
        error = error_of(way, storage)
        if error is not None:  # None: the disk was full only when the temporary name was removed
            assert error.errno == errno.ENOSPC
            assert "disk is full" in str(error)
            assert type(error) in (StorageError, NotDurable)
            failures += 1
        assert LocalStorage(root).read("old/a", limit=3) == b"old"
        clean_up(root)
        points += 1
    assert points - failures in (0, 1)
    assert points >= 10


@WAYS
@pytest.mark.parametrize("moment", MOMENTS)
def test_death_at_any_call(root: Path, way: Callable[[Storage], None], moment: Moment) -> None:
    """After a death anywhere, the old key is intact; a created key is whole or absent; the next writer goes on."""
    calls = calls_of(way, root)
    for number in range(1, len(calls) + 1):
        system = FaultySystem(die(number, moment=moment))
        with pytest.raises(Killed):
            way(LocalStorage(root, system=system))
        assert len(system.calls) == number, "the dead make no further calls"
        clean = LocalStorage(root)
        assert clean.read("old/a", limit=3) == b"old"
        if way is create:
            assert [stored.nbytes for stored in clean.listing("f")] in ([], [len(DATA)])
        clean.create("f/next", b"next")
        clean_up(root)
        assert names_in(root) == ["old"]
    assert len(calls) >= 10


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_real_kill_at_any_call(root: Path, moment: Moment) -> None:
    """The same with real processes and SIGKILL: what the model says about death is true."""
    calls = calls_of(create, root)
    seen: set[tuple[int, ...]] = set()
    for number in range(1, len(calls) + 1):
        child = os.fork()
        if child == 0:
            try:
                create(LocalStorage(root, system=FaultySystem(sigkill(number, moment=moment))))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        clean = LocalStorage(root)
        seen.add(tuple(stored.nbytes for stored in clean.listing("f")))
        assert clean.read("old/a", limit=3) == b"old"
        clean.create("f/next", b"next")
        clean_up(root)
    assert seen == {(), (len(DATA),)}


# links


def test_a_link_whose_answer_was_lost_is_a_success(root: Path) -> None:
    """NFS may say EEXIST of our own link: the temporary file's second name proves that it is ours."""
    system = FaultySystem(fail(1, errno.EEXIST, name="link", moment="after"))
    create(LocalStorage(root, system=system))
    assert system.struck == 1
    assert system.calls[-2:][0].name == "fsync_dir"
    assert LocalStorage(root).read("f/new", limit=99) == DATA
    assert names_in(root / "f") == ["new"]


def test_a_link_that_lost_the_race_is_key_exists(root: Path) -> None:
    """EEXIST without a second name is another's: nothing of ours stays."""
    with pytest.raises(KeyExists):
        create(LocalStorage(root, system=FaultySystem(fail(1, errno.EEXIST, name="link"))))
    assert names_in(root / "f") == []


@pytest.mark.parametrize(
    "error", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL]
)
def test_without_hard_links_the_name_itself_is_created(root: Path, error: int) -> None:
    """Exclusively, fsynced, with its directory fsynced after it; the second create is refused."""
    system = FaultySystem(fail(1, error, name="link", lasting=True))
    storage = LocalStorage(root, system=system)
    create(storage)
    assert [call.name for call in system.calls][-6:] == ["unlink", "open_new", "write", "fsync", "close", "fsync_dir"]
    with pytest.raises(KeyExists):
        storage.create("f/new", b"other")
    assert storage.read("f/new", limit=99) == DATA
    assert names_in(root / "f") == ["new"]


def test_without_hard_links_a_failure_leaves_nothing(root: Path) -> None:
    """An error while the name itself is written removes it again, so that no torn value is left behind."""

    class NoLinks(FaultySystem):
        def link(self, source: str, target: str) -> None:
            raise OSError(errno.EPERM, "no links here")

    points = 0
    for name in ("write", "fsync", "close"):
        storage = LocalStorage(root, system=NoLinks(fail(2, errno.EIO, name=name, moment="torn")))
        with pytest.raises(StorageError):
            create(storage)
        assert names_in(root / "f") == []
        points += 1
    assert points == 3


# the rest


@WAYS
def test_short_writes_are_continued(root: Path, way: Callable[[Storage], None]) -> None:
    """A system that takes half of the bytes each time gets them all."""
    system = FaultySystem(short_write())
    way(LocalStorage(root, system=system))
    assert LocalStorage(root).read("f/new", limit=99) == DATA
    assert [call.name for call in system.calls].count("write") > 3


def test_a_write_that_takes_nothing_is_an_error(root: Path) -> None:
    """It does not loop for ever."""

    class Stuck(FaultySystem):
        def write(self, file: object, data: memoryview) -> int:
            return 0

    for way in (create, stream):
        with pytest.raises(StorageError, match="none of the bytes"):
            way(LocalStorage(root, system=Stuck()))
        assert names_in(root / "f") == []


def test_an_fsync_that_failed_is_not_repeated(root: Path) -> None:
    """Neither create nor commit asks twice, and the file can not be committed later."""
    for way in (create, stream):
        system = FaultySystem(fail(1, errno.EIO, name="fsync"))
        with pytest.raises(StorageError):
            way(LocalStorage(root, system=system))
        assert [call.name for call in system.calls].count("fsync") == 1
    file = LocalStorage(root, system=FaultySystem(fail(1, errno.EIO, name="fsync"))).open_new("f/new")
    with pytest.raises(StorageError):
        file.commit()
    with pytest.raises(ValueError, match="committed or aborted"):
        file.commit()
    assert names_in(root / "f") == []


def test_reading_that_fails_is_never_missing(root: Path) -> None:
    """An unreadable key or folder is a StorageError: a reader must not take it for one that is not there."""
    storage: Callable[[str], Storage] = lambda name: LocalStorage(
        root, system=FaultySystem(fail(1, errno.EIO, name=name))
    )
    calls: list[Callable[[], object]] = [
        lambda: storage("open_read").read("old/a", limit=9),
        lambda: storage("fstat").read("old/a", limit=9),
        lambda: storage("read_into").read("old/a", limit=9),
        lambda: storage("lstat").read("old/a", limit=9),
        lambda: storage("read_into").read_into("old/a", 0, memoryview(bytearray(3))),
        lambda: storage("open_read").size("old/a"),
        lambda: storage("scan").listing("old"),
        lambda: storage("scan").listing(""),
        lambda: storage("scan").folders(),
    ]
    for call in calls:
        with pytest.raises(StorageError) as caught:
            call()
        assert type(caught.value) is StorageError
        assert caught.value.errno == errno.EIO


def test_a_delete_that_fails_says_where(root: Path) -> None:
    """The keys before it are gone, those after it stay; a folder that cannot be removed is no error."""
    for key in ("f/1", "f/2", "f/3"):
        LocalStorage(root).create(key, b"")
    with pytest.raises(StorageError, match="'f/2'") as caught:
        LocalStorage(root, system=FaultySystem(fail(2, errno.EACCES, name="unlink"))).delete(["f/1", "f/2", "f/3"])
    assert caught.value.key == "f/2"
    assert names_in(root / "f") == ["2", "3"]
    LocalStorage(root, system=FaultySystem(fail(1, errno.EBUSY, name="rmdir"))).delete(["f/2", "f/3"])
    assert names_in(root / "f") == []


@pytest.mark.parametrize(
    ("error", "hint"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "owner and mode"), (errno.EIO, "log")],
)
def test_messages_help(root: Path, error: int, hint: str) -> None:
    """What, where, the system's own words, and what to do."""
    with pytest.raises(StorageError) as caught:
        create(LocalStorage(root, system=FaultySystem(fail(1, error, name="open_new"))))
    for part in ("'f/new'", str(root), os.strerror(error), hint):
        assert part in str(caught.value)
