"""Large local files where direct writes are refused, cut short or fail, the disk is full, or the power is cut."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest

from ckptman.errors import StorageError
from ckptman.storage.base import Storage
from ckptman.storage.local import LocalStorage
from ckptman.storage.system import System
from ckptman.testing.faults import MOMENTS, Call, FaultySystem, Killed, Moment, die, fail, short_write
from ckptman.testing.power_loss import RecordingSystem, crash_states

MIB = 1 << 20
DATA = random.Random(1).randbytes(3 * MIB + 5)
REFUSALS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EFAULT)
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class TakesDirect(System):
    """Every direct write is taken, whatever filesystem the tests run on."""

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        return file.write(data)


class TakesNone(System):
    """None is; so large writes are written back early."""

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def points_of(disk: type[System], root: Path, moment: Moment) -> list[tuple[int, Call]]:
    """Every call that `stream` makes on *disk*, numbered; not those that the disk refuses before *moment* comes."""
    system = FaultySystem(inner=disk())
    stream(LocalStorage(root, system=system))
    is_refused = "write_direct" if disk is TakesNone and moment != "before" else ""
    return [(number, call) for number, call in enumerate(system.calls, start=1) if call.name != is_refused]


DISKS = pytest.mark.parametrize("disk", [TakesDirect, TakesNone])


def stream(storage: Storage, key: str = "f/new", data: bytes = DATA) -> None:
    """Write *data* from one aligned slot of a MiB, as the pipeline does."""
    slot = memoryview(mmap.mmap(-1, MIB))
    with storage.open_new(key) as file:
        for start in range(0, len(data), MIB):
            part = data[start : start + MIB]
            slot[: len(part)] = part
            file.write(slot[: len(part)])
    storage.persist(["f", ""])


def read(root: Path, key: str = "f/new") -> bytes:
    return LocalStorage(root).read(key, limit=99 * MIB)


def count(system: FaultySystem, name: str) -> int:
    return [call.name for call in system.calls].count(name)


# refused and cut short


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("error", REFUSALS)
def test_a_direct_write_that_is_refused_is_made_good(tmp_path: Path, error: int, at: int) -> None:
    """At first or in the middle: the bytes are whole, and neither this file nor the next one tries again."""
    system = FaultySystem(fail(at, error, name="write_direct"), inner=TakesDirect())
    storage = LocalStorage(tmp_path, system=system)
    stream(storage)
    stream(storage, "f/next")
    assert system.struck == 1
    assert count(system, "write_direct") == at
    assert read(tmp_path) == read(tmp_path, "f/next") == DATA


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("taken", [0, 1, 512, 4096, 5000, MIB - 1])
def test_a_direct_write_that_is_cut_short_is_continued(tmp_path: Path, taken: int, at: int) -> None:
    """Whatever number of bytes was taken, even half a block, the rest follows; no direct write is tried again."""
    tries = 0

    class Short(System):
        def write_direct(self, file: FileIO, data: memoryview) -> int:
            nonlocal tries
            tries += 1
            return file.write(data[:taken] if tries == at else data)

    storage = LocalStorage(tmp_path, system=Short())
    stream(storage)
    stream(storage, "f/next")
    assert tries == at
    assert read(tmp_path) == read(tmp_path, "f/next") == DATA


@DISKS
@pytest.mark.parametrize("name", ["write", "write_direct"])
def test_all_writes_are_short(tmp_path: Path, disk: type[System], name: str) -> None:
    """Halves of halves add up."""
    stream(LocalStorage(tmp_path, system=FaultySystem(short_write(name=name), inner=disk())))
    assert read(tmp_path) == DATA


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ESPIPE, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_write_back_that_is_not_to_be_had_is_no_error(tmp_path: Path, error: int) -> None:
    """It is advice: refused once, it is not asked for again, and the file is as right."""
    system = FaultySystem(fail(1, error, name="begin_write_back"), inner=TakesNone())
    storage = LocalStorage(tmp_path, system=system)
    stream(storage)
    stream(storage, "f/next")
    assert count(system, "begin_write_back") == system.struck == 1
    assert read(tmp_path) == read(tmp_path, "f/next") == DATA


# errors


@DISKS
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_error_at_any_call(tmp_path: Path, disk: type[System], moment: Moment) -> None:
    """
    Each is a StorageError with its errno, of early write-back too; no file is left, and the storage goes on.

    Not so where the name could not be made durable: there the file is whole.
    """
    calls = points_of(disk, tmp_path / "honest", moment)
    first = next(index for index, (_, call) in enumerate(calls) if call.name == "open_new")
    seen: set[str] = set()
    points = 0
    for number, call in calls[first:]:
        for error in ERRORS:
            root = tmp_path / f"{number}-{error}"
            system = FaultySystem(fail(number, error, moment=moment), inner=disk())
            storage = LocalStorage(root, system=system)
            with pytest.raises(StorageError, match=os.strerror(error)) as caught:
                stream(storage)
            assert caught.value.errno == error
            assert system.struck == 1
            if call.name == "fsync_dir":
                assert read(root) == DATA
            elif call.name != "open_new":
                assert not (root / "f/new").exists(), call
                assert count(system, "fsync") <= 1
            stream(storage, "f/next")
            assert read(root, "f/next") == DATA
            points += 1
            seen.add(call.name)
    assert seen >= {"write", "fsync", "close", "begin_write_back" if disk is TakesNone else "write_direct"}
    print(f"{points} points")
    assert points >= 30


@DISKS
def test_a_write_that_failed_ends_the_file(tmp_path: Path, disk: type[System]) -> None:
    """It cannot be committed without the bytes that are missing: it is gone already."""
    for name in ("write_direct", "write", "begin_write_back"):
        system = FaultySystem(fail(1, errno.EIO, name=name), inner=disk())
        file = LocalStorage(tmp_path, system=system).open_new("f/new")
        try:
            file.write(memoryview(mmap.mmap(-1, MIB)))
            file.write(b"end")
        except StorageError:
            assert not (tmp_path / "f/new").exists()
            for act in (file.commit, lambda file=file: file.write(b"more")):
                with pytest.raises(ValueError, match="committed or aborted"):
                    act()
        else:
            assert system.struck == 0, "it was not this disk's call"
            file.abort()


def test_a_disk_that_was_full_is_written_direct_again(tmp_path: Path) -> None:
    """A direct write that is cut short since the disk is full is an error, not a sign that the disk takes none."""
    is_full = True
    tries = 0

    class Full(System):
        def write_direct(self, file: FileIO, data: memoryview) -> int:
            nonlocal tries
            tries += 1
            return file.write(data[:4096] if is_full else data)

        def write(self, file: FileIO, data: memoryview) -> int:
            if is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(file, data)

    storage = LocalStorage(tmp_path, system=Full())
    with pytest.raises(StorageError, match="disk is full"):
        stream(storage)
    assert not (tmp_path / "f/new").exists()
    is_full = False
    stream(storage)
    assert read(tmp_path) == DATA
    assert tries == 1 + 3


def test_an_fsync_that_fails_while_it_is_measured(tmp_path: Path) -> None:
    """It is the error of the file, is not repeated, and teaches nothing."""
    for at in (1, 2):
        system = FaultySystem(fail(at, errno.EIO, name="fsync"), inner=Forgets())
        file = LocalStorage(tmp_path, system=system).open_new("f/new")
        with pytest.raises(StorageError, match="failure"):
            file.write(memoryview(mmap.mmap(-1, 160 * MIB)))
        assert count(system, "fsync") == at
        assert not (tmp_path / "f/new").exists()


class Forgets(System):
    """Keeps nothing of what is written."""

    def write(self, file: FileIO, data: memoryview) -> int:
        return len(data)

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        return len(data)


# death and power loss


@DISKS
@pytest.mark.parametrize("moment", MOMENTS)
def test_death_at_any_call(tmp_path: Path, disk: type[System], moment: Moment) -> None:
    """The dead make no further calls, and the next writer goes on."""
    points = points_of(disk, tmp_path / "honest", moment)
    for number, _ in points:
        root = tmp_path / f"{number}"
        system = FaultySystem(die(number, moment=moment), inner=disk())
        with pytest.raises(Killed):
            stream(LocalStorage(root, system=system))
        assert len(system.calls) == number
        stream(LocalStorage(root), "f/next")
        assert read(root, "f/next") == DATA
    assert len(points) >= 10


def losses_of(system: RecordingSystem, storage: Storage) -> tuple[int, int]:
    """How many states a power loss could leave while three files are written, and in how many bytes are lost."""
    values = {"f/a": DATA[: MIB + 4099], "f/b": DATA[MIB : 2 * MIB + 4096], "f/c": DATA[MIB:]}
    for key, data in values.items():
        stream(storage, key, data)
        system.mark(key)
    states = lost = 0
    for state in crash_states(system.journal, seed=1, limit_per_prefix=32):
        states += 1
        lost += any(state.tree.get(f"root/{key}") != values[key] for key in state.acknowledged)
    return states, lost


class NoFsync(RecordingSystem):
    def fsync(self, file: FileIO) -> None: ...


@DISKS
@pytest.mark.parametrize("kind", [RecordingSystem, NoFsync])
def test_power_loss(tmp_path: Path, disk: type[System], kind: Callable[..., RecordingSystem]) -> None:
    """Direct or written back early, what was acknowledged survives; and without fsync, both are found to lose it."""
    inner = FaultySystem(inner=disk())
    system = kind(tmp_path, inner=inner)
    states, lost = losses_of(system, LocalStorage(tmp_path / "root", system=system))
    print(f"{states} states, {lost} lost; {count(inner, 'write_direct')} direct writes")
    assert count(inner, "write_direct") == (4 if disk is TakesDirect else 1)
    assert count(inner, "begin_write_back") == (0 if disk is TakesDirect else 4)
    assert states >= 20
    assert (lost > 0) == (kind is NoFsync)
