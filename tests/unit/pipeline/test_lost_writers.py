"""What survivors of a dead rank 0 find out, and how soon, where its lease or its lock would keep everybody waiting."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ckptman.errors import CommitUnknown, Fenced, RankLost, SaveFailed
from ckptman.pipeline import loss
from ckptman.repository import ownership
from ckptman.repository.file_lock import RootLock
from ckptman.repository.head import read_head
from ckptman.repository.lease import LIFE_S
from ckptman.repository.ownership import Ownership, depose, take
from ckptman.storage.base import Storage
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage

ATTEMPT = "step-000000000002.w0001.0123abcd"


class Leased(MemoryStorage):
    """A memory that can compare and swap: with a lease, as a bucket."""

    can_swap = True

    def read_version(self, key: str, *, limit: int) -> tuple[bytes, str]:
        data = self.read(key, limit=limit)
        return data, data.hex()

    def swap(self, key: str, data: bytes, *, expected: str) -> None:
        with self._lock:
            assert self._values[key].hex() == expected
            self._values[key] = data


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "SUCCESSION_S", 0.2)
    monkeypatch.setattr(loss, "PATIENCE_S", 1.0)


def elsewhere(owner: Ownership) -> Ownership:
    """*owner* as one of another process, which this one cannot ask to go."""
    del ownership._OWNERS[owner.storage.identity]
    return owner


def told(storage: Storage, owner: Ownership, rank: int, lost: tuple[int, ...] = (0,)) -> Any:
    error = RankLost("rank 0 (host a) is silent for 15 s", ranks=lost, hosts=("a",) * len(lost))
    return loss.find_out(storage, 2, ATTEMPT, owner.newest.number, error, rank=rank)


def test_a_lease_whose_holder_died_is_passed_over() -> None:
    """All know within a second, not after the life of the lease; and the dead one cannot commit if it lives."""
    storage = Leased()
    owner = elsewhere(take(storage, timeout_s=0))
    began = time.monotonic()
    with pytest.raises(SaveFailed, match="rank 0"):
        told(storage, owner, 1)
    with pytest.raises(SaveFailed, match="rank 0"):
        told(storage, owner, 2)
    assert time.monotonic() - began < 1 < LIFE_S
    assert read_head(storage).number == owner.newest.number + 1
    with pytest.raises(Fenced):
        owner.commit(tuple, "too late")
    owner.release()


def test_only_the_lowest_survivor_takes_over() -> None:
    storage = Leased()
    owner = elsewhere(take(storage, timeout_s=0))
    for rank, lost in ((2, (0,)), (1, (2,)), (3, (0, 1))):
        with pytest.raises(CommitUnknown):
            told(storage, owner, rank, lost)
    assert read_head(storage).number == owner.newest.number
    with pytest.raises(SaveFailed):
        told(storage, owner, 2, (0, 1))
    owner.release()


def test_a_writer_that_came_meanwhile_is_not_deposed() -> None:
    """It holds the lease by right, though it is not the one that is dead."""
    storage = Leased()
    first = elsewhere(take(storage, timeout_s=0))
    first.release()
    second = elsewhere(take(storage, timeout_s=0))
    with pytest.raises(Fenced, match="is there already"):
        depose(storage, after=first.newest.number, what="give up step 2")
    with pytest.raises(SaveFailed):
        told(storage, first, 1)
    second.commit(tuple, "goes on")
    second.release()


def test_a_lock_of_files_that_is_not_free_shows_that_rank_0_lives(tmp_path: Path) -> None:
    """It may only have been held up: nobody fences it, and nobody claims to know."""
    storage = LocalStorage(str(tmp_path))
    owner = elsewhere(take(storage, timeout_s=0))
    assert not RootLock(storage.lock_path).acquire(0)
    with pytest.raises(CommitUnknown, match="nobody says"):
        told(storage, owner, 1)
    owner.commit(tuple, "goes on")
    owner.release()
    with pytest.raises(SaveFailed):
        told(storage, owner, 1)
