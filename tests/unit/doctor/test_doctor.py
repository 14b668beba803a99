"""The doctor: a storage that does what it should passes, each thing that it should not do is found, nothing stays."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ckptman import CheckpointManager
from ckptman.cli._group import ckptman
from ckptman.doctor import costs, exclusion, nodes
from ckptman.doctor.examining import examine
from ckptman.doctor.exclusion import judge_race
from ckptman.doctor.findings import Finding, duration
from ckptman.storage.base import Stored
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage
from ckptman.testing.faults import FaultySystem, fail

ALWAYS_OK = (
    "writing", "create-only put", "seen by others", "create-only race", "locks", "listings", "requests", "write speed",
    "read speed", "clock",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "LARGE_NBYTES", 1 << 20)
    monkeypatch.setattr(costs, "PIECE_NBYTES", 1 << 20)
    monkeypatch.setattr(exclusion, "STALE_S", 0.2)
    monkeypatch.setattr(exclusion, "LISTINGS", 2)
    monkeypatch.setattr(exclusion, "RACERS", 2)
    monkeypatch.setattr(exclusion, "ROUNDS", 20)


def findings(storage: LocalStorage | MemoryStorage, root: object = None) -> dict[str, Finding]:
    found = list(examine(storage, storage.url if root is None else str(root)))
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def verdicts(found: Mapping[str, Finding]) -> dict[str, str]:
    return {name: one.verdict for name, one in found.items()}


def tree(path: Path) -> dict[str, int]:
    return {str(one.relative_to(path)): one.stat().st_mtime_ns for one in path.rglob("*") if one.is_file()}


def test_a_sound_directory_passes(tmp_path: Path) -> None:
    """All is measured, with figures; a root that did not exist, and what is above it, does not exist afterwards."""
    found = findings(LocalStorage(tmp_path / "a" / "b"))
    assert {name: found[name].verdict for name in ALWAYS_OK} == dict.fromkeys(ALWAYS_OK, "ok")
    assert found.keys() == {*ALWAYS_OK, "durability", "free space"}
    assert found["create-only race"].figures == {"keys": 20, "racers": 2, "double_wins": 0, "lost": 0}
    assert found["requests"].figures.keys() == {"put_s", "get_s", "list_s", "delete_s"}
    assert all(seconds > 0 for seconds in found["requests"].figures.values())
    assert list(tmp_path.iterdir()) == []


def test_a_root_in_use_is_not_disturbed(tmp_path: Path) -> None:
    """Beside a live writer: it passes, the writer goes on, and no file of the root was touched or added."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
        manager.save(1, block=True)
        before = tree(tmp_path)
        assert "bad" not in {one.verdict for name, one in findings(LocalStorage(tmp_path)).items() if name in ALWAYS_OK}
        assert tree(tmp_path) == before
        manager.save(2, block=True)
    assert sorted(path.name[:8] for path in tmp_path.iterdir()) == [
        "catalog", "ckptman.", "step-000", "step-000", "writer.l",
    ]  # fmt: skip


def test_memory_is_for_one_process(tmp_path: Path) -> None:
    """Another process sees nothing of it: red, and nothing stays."""
    storage = MemoryStorage("x")
    found = findings(storage)
    assert found["seen by others"].verdict == "bad"
    assert "create-only race" not in found
    assert storage.folders() == []


def test_another_root_under_the_same_text_is_found(tmp_path: Path) -> None:
    """Such as a mount that one process has and the other has not."""
    assert findings(LocalStorage(tmp_path / "a"), tmp_path / "b")["seen by others"].verdict == "bad"


def test_a_create_that_overwrites_is_found(tmp_path: Path) -> None:
    """The one thing that no root can do without."""

    class Overwriting(LocalStorage):
        def create(self, key, data):  # type: ignore[no-untyped-def]
            self.delete([key])
            super().create(key, data)

    assert findings(Overwriting(tmp_path))["create-only put"].verdict == "bad"


def test_a_race_that_two_won_is_found() -> None:
    """Two that believe in one key; one whose key holds another's bytes; and a race that nobody won."""
    storage = MemoryStorage()
    for key, token in {"race-0": b"a", "race-1": b"b"}.items():
        storage.create(key, token)
    judged = {
        name: judge_race(storage, won, name="race", who="processes")
        for name, won in {
            "fair": {"a": ["race-0"], "b": ["race-1"]},
            "twice": {"a": ["race-0"], "b": ["race-0", "race-1"]},
            "swapped": {"a": ["race-1"], "b": ["race-0"]},
            "gone": {"a": ["race-0", "race-2"], "b": ["race-1"]},
            "nobody": {"a": [], "b": []},
        }.items()
    }
    assert {name: one.verdict for name, one in judged.items() if one.verdict == "ok"} == {"fair": "ok"}
    assert judged["twice"].figures["double_wins"] == 1
    assert judged["swapped"].figures["lost"] == 2


def test_locks_that_do_not_exclude_are_found(tmp_path: Path) -> None:
    """Two processes that hold what they take for one lock."""

    class Elsewhere(LocalStorage):
        @property
        def lock_path(self) -> Path:
            return tmp_path / "elsewhere" / "writer.lock"

    found = verdicts({one.name: one for one in _excluding(Elsewhere(tmp_path / "root"))})
    assert found["locks"] == "bad"


def _excluding(storage: LocalStorage) -> list[Finding]:
    return list(exclusion.look(storage, storage.url, "doctor-0123456789abcdef"))


@pytest.mark.parametrize(("calls", "name"), [(1, "only after"), (1000, "did not show")])
def test_stale_listings_are_found(tmp_path: Path, calls: int, name: str) -> None:
    """Late, and never: as on a mount whose directories are cached."""

    class Stale(LocalStorage):
        left = calls

        def listing(self, folder: str) -> list[Stored]:
            found = super().listing(folder)
            if any("fresh" in stored.key for stored in found) and self.left:
                self.left -= 1
                return []
            return found

    finding = next(one for one in _excluding(Stale(tmp_path)) if one.name == "listings")
    assert finding.verdict == "bad"
    assert name in finding.what


@pytest.mark.parametrize(("hours", "verdict"), [(1, "bad"), (-1, "bad"), (0, "ok")])
def test_a_clock_that_is_off_is_found(tmp_path: Path, hours: int, verdict: str) -> None:
    """Ahead and behind; the figure says how far."""

    class Skewed(LocalStorage):
        def modified_at(self, key: str) -> datetime:
            return super().modified_at(key) + timedelta(hours=hours)

    finding = next(one for one in costs.look(Skewed(tmp_path), "doctor-0123456789abcdef") if one.name == "clock")
    assert finding.verdict == verdict
    assert round(finding.figures["skew_s"] / 3600) == hours


def test_a_filesystem_in_memory_is_no_place_for_checkpoints(scratch: Path) -> None:
    """It passes a power loss with nothing left."""
    if costs.filesystem(scratch) != "tmpfs":
        pytest.skip("this machine has no filesystem in memory")
    found = findings(LocalStorage(scratch / "root"))
    assert found["durability"].verdict == "bad"


def test_a_root_that_cannot_be_written_is_said_to_be(tmp_path: Path) -> None:
    """Red for writing, with the reason; reading is measured all the same; nothing is made."""
    storage = LocalStorage(tmp_path / "root", system=FaultySystem(fail(1, errno.EROFS, lasting=True)))
    found = findings(storage)
    assert verdicts(found) == {"writing": "bad", "reading": "ok"}
    assert "read-only" in found["writing"].what
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_fails_later_is_a_finding(tmp_path: Path) -> None:
    """A disk that fills up in the middle: what was found before is told, and the folder is removed."""
    storage = LocalStorage(tmp_path / "root", system=FaultySystem(fail(20, errno.ENOSPC, name="write", lasting=True)))
    found = findings(storage)
    assert found["failure"].verdict == "bad"
    assert "full" in found["failure"].what
    assert "locks" in found
    assert list(tmp_path.iterdir()) == []


# several machines


def gather(*places: LocalStorage, count: int, timeout_s: float = 20.0) -> list[list[Finding]]:
    """One node on a thread for each of *places*."""
    with ThreadPoolExecutor(len(places)) as pool:
        futures = [
            pool.submit(lambda s=place: list(nodes.meet(s, nodes=count, timeout_s=timeout_s, missing=1)))
            for place in places
        ]
        return [future.result() for future in futures]


def test_nodes_that_see_one_root_pass_and_leave_nothing(tmp_path: Path) -> None:
    """Each has all findings; a root that was not there is gone."""
    root = tmp_path / "root"
    for found in gather(*(LocalStorage(root) for _ in range(3)), count=3):
        assert [(one.name, one.verdict) for one in found] == [
            ("nodes", "ok"), ("race of the nodes", "ok"), ("locks of the nodes", "ok"),
        ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_hello_that_an_earlier_examination_left_counts_for_nothing(tmp_path: Path) -> None:
    """It answers nobody; and it goes with the next examination."""
    root = tmp_path / "root"
    LocalStorage(root).create("doctor-nodes/0000000000000000/hello", b'{"host": "old", "missing": 0}')
    for found in gather(LocalStorage(root), LocalStorage(root), count=2):
        assert [one.verdict for one in found] == ["ok"] * 3
        assert "old" not in found[0].what
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_see_different_roots_wait_in_vain(tmp_path: Path) -> None:
    """Red on both, within the timeout, and nothing stays."""
    for found in gather(LocalStorage(tmp_path / "a"), LocalStorage(tmp_path / "b"), count=2, timeout_s=0.3):
        assert [one.verdict for one in found] == ["bad"]
        assert "saw 0 of 1" in found[0].what
    assert not list(tmp_path.rglob("doctor-*"))


def test_a_node_too_many_is_found(tmp_path: Path) -> None:
    """Three that came for two: nobody says that all is well."""
    gate = LocalStorage(tmp_path)
    gate.create("doctor-nodes/0000000000000000/hello", b'{"host": "third", "missing": 0}')

    class Answered(LocalStorage):
        """The third node answers everybody at once."""

        def create(self, key, data):  # type: ignore[no-untyped-def]
            super().create(key, data)
            if key.endswith("/hello"):
                other = key.split("/")[1]
                for one in ("0000000000000000", "1111111111111111"):
                    super().create(f"doctor-nodes/{other}/ack-{one}", b"x")

    gate.create("doctor-nodes/1111111111111111/hello", b'{"host": "second", "missing": 0}')
    (found,) = gather(Answered(tmp_path), count=2, timeout_s=0.3)
    assert [one.verdict for one in found] == ["bad"]
    assert "3 nodes came instead of 2" in found[0].what


def test_locks_of_nodes_that_do_not_exclude_are_found(tmp_path: Path) -> None:
    """As between an NFS client and a process on the server itself."""

    class Elsewhere(LocalStorage):
        @property
        def lock_path(self) -> Path:
            return tmp_path / "elsewhere" / "writer.lock"

    (tmp_path / "elsewhere").mkdir()
    for found in gather(LocalStorage(tmp_path / "root"), Elsewhere(tmp_path / "root"), count=2):
        assert {one.name: one.verdict for one in found}["locks of the nodes"] == "bad"


# the command


def test_the_command(tmp_path: Path) -> None:
    """A table with marks, or one document; 1 if anything is bad; nothing stays."""
    root = str(tmp_path / "root")
    ran = CliRunner().invoke(ckptman, ["doctor", root, "--json"])
    assert '"schema": 1' in ran.stdout
    assert ran.exit_code == (0 if '"ok": true' in ran.stdout else 1)
    ran = CliRunner().invoke(ckptman, ["doctor", "memory://doctor"])
    assert ran.exit_code == 1
    assert any(line.startswith("✗  seen by others") for line in ran.stdout.splitlines())
    ran = CliRunner().invoke(ckptman, ["doctor", "memory://doctor", "--nodes", "2", "--timeout", "0"])
    assert "waited 0 s for the other nodes" in ran.stdout
    assert list(tmp_path.iterdir()) == []
    assert CliRunner().invoke(ckptman, ["doctor", root, "--nodes", "1"]).exit_code == 2


def test_durations() -> None:
    """As people say them."""
    assert [duration(s) for s in (0.0000123, 0.5, 12.345)] == ["0.0123 ms", "500 ms", "12.3 s"]
