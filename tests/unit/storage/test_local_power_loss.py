"""What LocalStorage acknowledged survives every power loss; and the model of power loss can tell."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptman.storage.base import Storage
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import FaultySystem, fail
from ckptman.testing.journal import Entry, Linked, Made, Marked, Removed, Synced, SyncedNames, Wrote
from ckptman.testing.power_loss import CrashState, RecordingSystem, crash_states

KEYS = [f"{folder}/{number}" for number in range(9) for folder in ("f", "g/h")]


class NoFileFsync(RecordingSystem):
    def fsync(self, file: object) -> None: ...


class NoDirectoryFsync(RecordingSystem):
    def fsync_dir(self, path: str) -> None: ...


class NoRootFsync(RecordingSystem):
    def fsync_dir(self, path: str) -> None:
        if not path.endswith("root"):
            super().fsync_dir(path)


class NoBaseFsync(RecordingSystem):
    def fsync_dir(self, path: str) -> None:
        if path != self._base:
            super().fsync_dir(path)


def create(storage: Storage, key: str) -> None:
    storage.create(key, key.encode())


def stream(storage: Storage, key: str) -> None:
    with storage.open_new(key) as file:
        file.write(key[:2].encode())
        file.write(key[2:].encode())
    folder, _, _ = key.rpartition("/")
    storage.persist([folder, *([folder.partition("/")[0]] if "/" in folder else []), ""])


def record(
    system: RecordingSystem, storage: Storage, way: Callable[[Storage, str], None], *, keys: list[str] = KEYS
) -> list[CrashState]:
    for key in keys:
        way(storage, key)
        system.mark(key)
    return list(crash_states(system.journal, seed=1, limit_per_prefix=200))


def lost(states: list[CrashState]) -> int:
    """In how many states an acknowledged key is missing or wrong."""
    count = 0
    for state in states:
        values = {
            stored.key: state.storage("deep/root").read(stored.key, limit=99)
            for stored in state.storage("deep/root").listing("")
        }
        count += any(values.get(key) != key.encode() for key in state.acknowledged)
    return count


@pytest.mark.parametrize("way", [create, stream])
def test_what_was_acknowledged_survives(tmp_path: Path, way: Callable[[Storage, str], None]) -> None:
    """In every state after every call, each acknowledged key has its bytes, from the first one of a new root on."""
    system = RecordingSystem(tmp_path)
    states = record(system, LocalStorage(tmp_path / "deep" / "root", system=system), way)
    assert lost(states) == 0
    assert len(states) >= 100, len(states)


def test_a_created_key_is_whole_in_every_state(tmp_path: Path) -> None:
    """Acknowledged or not, whichever state: a key that is there has all of its bytes."""
    system = RecordingSystem(tmp_path)
    for state in record(system, LocalStorage(tmp_path / "deep" / "root", system=system), create):
        storage = state.storage("deep/root")
        for stored in storage.listing(""):
            assert storage.read(stored.key, limit=99) == stored.key.encode()


def test_what_was_acknowledged_survives_without_hard_links(tmp_path: Path) -> None:
    """There, an unacknowledged key may be torn, but an acknowledged one is durable as well."""
    system = RecordingSystem(tmp_path)
    faulty = FaultySystem(fail(1, errno.EPERM, name="link", lasting=True), inner=system)
    states = record(system, LocalStorage(tmp_path / "deep" / "root", system=faulty), create)
    assert lost(states) == 0
    assert len(states) >= 100, len(states)


@pytest.mark.parametrize("way", [create, stream])
@pytest.mark.parametrize("broken", [NoFileFsync, NoDirectoryFsync, NoRootFsync, NoBaseFsync])
def test_the_model_finds_what_a_missing_fsync_loses(
    tmp_path: Path, broken: type[RecordingSystem], way: Callable[[Storage, str], None]
) -> None:
    """Leave out the fsync of files, of directories, of the root alone or of the one above it, and keys are lost."""
    system = broken(tmp_path)
    states = record(system, LocalStorage(tmp_path / "deep" / "root", system=system), way, keys=KEYS[:4])
    assert lost(states) > 0


def test_a_folder_whose_maker_was_killed_survives(tmp_path: Path) -> None:
    """A folder made by a process that died before it fsynced the root does not take the next one's key with it."""
    system = RecordingSystem(tmp_path)
    LocalStorage(tmp_path / "deep" / "root", system=system).open_new("f/dead").abort()
    states = record(system, LocalStorage(tmp_path / "deep" / "root", system=system), create)
    assert lost(states) == 0


def test_deleting_takes_nothing_else(tmp_path: Path) -> None:
    """While keys are deleted, every other acknowledged key survives; and a deleted one is whole or gone."""
    system = RecordingSystem(tmp_path)
    storage = LocalStorage(tmp_path / "root", system=system)
    for key in KEYS:
        create(storage, key)
    system.mark("created")
    doomed = KEYS[:6:2]
    storage.delete(doomed)
    left = {key: key.encode() for key in KEYS if key not in doomed}
    seen: set[tuple[str, ...]] = set()
    for state in crash_states(system.journal, seed=1):
        if state.acknowledged:
            survivor = state.storage("root")
            values = {stored.key: survivor.read(stored.key, limit=9) for stored in survivor.listing("")}
            assert values == {key: key.encode() for key in values}
            assert values.items() >= left.items()
            seen.add(tuple(values))
    assert len(seen) == 8, "each of three deletions may come back or not"


# the model itself


def trees(*journal: Entry) -> set[tuple[tuple[str, bytes], ...]]:
    """The trees that a power loss can leave after the whole of *journal*."""
    states = crash_states([*journal, Marked("end")], seed=0, limit_per_prefix=1000)
    return {tuple(sorted(state.tree.items())) for state in states if state.acknowledged}


def test_nothing_synced() -> None:
    """A name may be missing; the bytes may be missing, cut or zeros."""
    assert trees(Made("a", 1), Wrote(1, b"abcd")) == {
        (),
        (("a", b""),),
        (("a", b"ab"),),
        (("a", b"abcd"),),
        (("a", bytes(4)),),
    }


def test_a_synced_file_may_have_no_name() -> None:
    """The fsync of a file keeps its bytes, not its name."""
    assert trees(Made("a", 1), Wrote(1, b"abcd"), Synced(1)) == {(), (("a", b"abcd"),)}


def test_a_synced_name_may_have_no_bytes() -> None:
    """The fsync of a directory keeps names, not bytes."""
    assert trees(Made("a", 1), Wrote(1, b"xy"), SyncedNames("")) == {
        (("a", b""),),
        (("a", b"x"),),
        (("a", b"xy"),),
        (("a", bytes(2)),),
    }


def test_bytes_after_the_last_fsync_are_uncertain() -> None:
    """What was fsynced before stays in front of them."""
    assert trees(Made("a", 1), Wrote(1, b"x"), Synced(1), SyncedNames(""), Wrote(1, b"yz")) == {
        (("a", b"x"),),
        (("a", b"xy"),),
        (("a", b"xyz"),),
        (("a", b"x\0\0"),),
    }


def test_names_change_independently() -> None:
    """Of a link and the removal of the old name, either may happen without the other; both names share the bytes."""
    journal = (Made("t", 1), Wrote(1, b"x"), Synced(1), SyncedNames(""), Linked("t", "a"), Removed("t"))
    assert trees(*journal) == {(), (("a", b"x"),), (("t", b"x"),), (("a", b"x"), ("t", b"x"))}
    assert trees(*journal, SyncedNames("")) == {(("a", b"x"),)}


def test_a_file_in_a_lost_directory_is_lost() -> None:
    """The fsync of a directory does not keep the directory's own name."""
    journal = (Made("d", None), Made("d/a", 1), Wrote(1, b"x"), Synced(1), SyncedNames("d"))
    assert trees(*journal) == {(), (("d/a", b"x"),)}
    assert trees(*journal, SyncedNames("")) == {(("d/a", b"x"),)}


def test_what_is_gone_for_good_opens_no_questions() -> None:
    """A file without any name, durable or not, leaves one state, however much was written to it."""
    assert trees(Made("a", 1), Removed("a"), SyncedNames(""), Wrote(1, b"x"), Synced(1), Wrote(1, b"y")) == {()}
    journal = (Made("d", None), Made("d/a", 1), Removed("d/a"), Removed("d"), SyncedNames(""))
    assert trees(*journal) == {()}
    gone: list[Entry] = []
    for number in range(10):
        gone += [Made(f"{number}", number), Removed(f"{number}"), SyncedNames(""), Wrote(number, b"xy")]
    states = crash_states([*gone, Made("a", 10), Made("b", 11), Marked("end")], seed=0, limit_per_prefix=4)
    assert {tuple(sorted(state.tree)) for state in states if state.acknowledged} == {(), ("a",), ("b",), ("a", "b")}


def test_many_choices_are_sampled_by_seed() -> None:
    """Above the limit: the extremes, each single loss, each single survivor, random ones; same seed, same states."""
    journal: list[Entry] = [Made(f"{number:02d}", number) for number in range(20)] + [Marked("end")]
    last = [state for state in crash_states(journal, seed=3, limit_per_prefix=64) if state.length == len(journal)]
    counts = [len(state.tree) for state in last]
    assert len(last) <= 64
    assert counts[0] == 20
    assert counts[1] == 0
    assert counts.count(19) >= 20
    assert counts.count(1) >= 20
    again = [state for state in crash_states(journal, seed=3, limit_per_prefix=64) if state.length == len(journal)]
    other = [state for state in crash_states(journal, seed=4, limit_per_prefix=64) if state.length == len(journal)]
    assert [state.tree for state in last] == [state.tree for state in again] != [state.tree for state in other]


def test_states_are_distinct_and_say_what_was_acknowledged() -> None:
    """No state comes twice; one and the same tree comes again once more was acknowledged."""
    journal: list[Entry] = [Made("a", 1), Synced(1), SyncedNames(""), Marked("a"), Synced(1), Marked("again")]
    states = [(tuple(state.tree), state.acknowledged, state.length) for state in crash_states(journal, seed=0)]
    assert states == [((), (), 0), (("a",), (), 1), (("a",), ("a",), 4), (("a",), ("a", "again"), 6)]


def test_the_journal_leaves_out_what_failed_and_what_is_elsewhere(tmp_path: Path) -> None:
    """A call that raised changed nothing as far as the model knows; directories above the base are not its business."""
    base = tmp_path / "base"
    base.mkdir()
    system = RecordingSystem(base, inner=FaultySystem(fail(1, errno.EIO, name="fsync")))
    storage = LocalStorage(base, system=system)
    with pytest.raises(OSError, match="a"):
        storage.create("a", b"x")
    assert not [entry for entry in system.journal if isinstance(entry, (Synced, Linked, SyncedNames))]
    assert [type(entry) for entry in system.journal] == [Made, Wrote, Removed]
