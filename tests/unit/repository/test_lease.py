"""Who may write to an object store: one at a time, for as long as it shows that it lives."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from ckptman.errors import Fenced, LockTimeout, StorageError
from ckptman.repository import lease as lease_module
from ckptman.repository.lease import LEASE, LIFE_S, Lease
from ckptman.repository.ownership import take
from ckptman.storage.base import KeyChanged
from ckptman.storage.memory import MemoryStorage


class Swapping(MemoryStorage):
    """A memory that can compare and swap. ``lost`` answers are those of changes that took effect."""

    can_swap = True
    lost = 0
    fails = False
    conflicts = 0
    on_swap: Callable[[], object] = staticmethod(lambda: None)
    after_read: Callable[[], object] = staticmethod(lambda: None)

    def read_version(self, key: str, *, limit: int) -> tuple[bytes, str]:
        self._refuse()
        data = self.read(key, limit=limit)
        self.after_read()
        return data, data.hex()

    def swap(self, key: str, data: bytes, *, expected: str) -> None:
        self._refuse()
        if self.conflicts:
            self.conflicts -= 1
            raise KeyChanged(key)
        with self._lock:
            if self._values[key].hex() != expected:
                raise KeyChanged(key)
            self._values[key] = data
        self.on_swap()
        if self.lost:
            self.lost -= 1
            raise StorageError("the answer was lost")

    def _refuse(self) -> None:
        if self.fails:
            raise StorageError("unreachable")


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: Callable[[float], object] = lambda now: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept(self.now)


@pytest.fixture
def storage() -> Swapping:
    return Swapping()


def lease_on(storage: Swapping, clock: Clock) -> Lease:
    return Lease(storage, clock=clock, sleep=clock.sleep)


def test_a_freed_lease_is_taken_at_once(storage: Swapping) -> None:
    """No wait at all, and the epoch goes up each time; the document is never gone."""
    clock = Clock()
    for epoch in (1, 2, 3):
        lease = lease_on(storage, clock)
        assert lease.acquire(0)
        assert lease.holder is not None
        assert (lease.holder.epoch, lease.holder.pid) == (epoch, os.getpid())
        lease.release()
        lease.release()
        assert storage.size(LEASE)
    assert clock.now == 0


def test_a_silent_holder_is_succeeded_after_its_life(storage: Swapping) -> None:
    """A waiter sees no change for 30 s by its own clock, and not a second less."""
    first, clock = lease_on(storage, Clock()), Clock()
    assert first.acquire(0)
    second = lease_on(storage, clock)
    assert not second.acquire(LIFE_S - 1)
    assert second.holder == first.holder
    began = clock.now
    assert second.acquire(60)
    assert LIFE_S <= clock.now - began <= LIFE_S + 1
    assert not first.renew()
    first.release()
    assert second.renew()
    second.release()


def test_a_holder_that_renews_keeps_it(storage: Swapping) -> None:
    """However long another waits, and whatever answers are lost on the way."""
    first, clock = lease_on(storage, Clock()), Clock()
    assert first.acquire(0)

    def renew(now: float) -> None:
        if now % 10 == 0:
            storage.lost = 1
            assert first.renew()

    clock.slept = renew
    assert not lease_on(storage, clock).acquire(500)
    first.release()


def test_of_two_waiters_one_gets_it(storage: Swapping) -> None:
    """Both see the same silent holder at the same moment; the second one's swap is refused, and it goes on waiting."""
    first = lease_on(storage, Clock())
    assert first.acquire(0)
    clock, third = Clock(), lease_on(storage, Clock())
    second = lease_on(storage, clock)

    def jump_in() -> None:
        if clock.now >= LIFE_S:
            storage.after_read = lambda: None
            third._look()
            assert third._put(third._ours())

    storage.after_read = jump_in
    assert not second.acquire(45)
    assert second.holder == third.holder
    assert second.holder is not None
    assert second.holder.epoch == 2
    first.release()
    assert not second.acquire(0)


def test_a_storage_that_is_down_costs_nothing(storage: Swapping) -> None:
    """A renewal that fails raises, and the next one finds the lease still ours."""
    lease = lease_on(storage, Clock())
    assert lease.acquire(0)
    storage.fails = True
    with pytest.raises(StorageError):
        lease.renew()
    storage.fails = False
    assert lease.renew()
    lease.release()


def test_a_damaged_document_is_waited_for_and_replaced(storage: Swapping) -> None:
    """Nobody knows who holds it, so it counts as held; nobody renews it, so it does not for ever."""
    storage.create(LEASE, b"{")
    clock = Clock()
    lease = lease_on(storage, clock)
    assert not lease.acquire(5)
    assert lease.acquire(60)
    lease.release()


def test_the_thread_renews_until_the_release(storage: Swapping, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called ckptman-lease, outlives a failure of the storage, and is gone after the release."""
    monkeypatch.setattr(lease_module, "RENEW_S", 0.01)
    lease = Lease(storage)
    assert lease.acquire(0)
    assert lease._thread.name == "ckptman-lease"
    assert lease._thread.is_alive()
    for fails in (False, True, False):
        storage.fails = fails
        seen = storage.read(LEASE, limit=999)
        deadline = time.monotonic() + 10
        while (storage.read(LEASE, limit=999) == seen) != fails:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    lease.release()
    assert not lease._thread.is_alive()


def test_a_second_writer_learns_who_the_first_is(storage: Swapping) -> None:
    """As with file locks: LockTimeout names host, pid and age; a released lease lets the next one in at once."""
    other = Lease(storage)
    assert other.acquire(0)
    with pytest.raises(LockTimeout, match=rf"pid {os.getpid()}, for \d+ s .*30 s after its last sign") as caught:
        take(storage, timeout_s=0)
    assert caught.value.pid == os.getpid()
    other.release()
    owner = take(storage, timeout_s=0)
    assert owner.writer.epoch == 1
    owner.release()


def test_losing_the_lease_is_not_yet_being_fenced(storage: Swapping) -> None:
    """Who lost it may commit until another has; from then on it is Fenced."""
    first = take(storage, timeout_s=0)
    clock = Clock()
    lease = lease_on(storage, clock)
    assert lease.acquire(60)
    first.commit(tuple, "a change")
    lease.release()
    other = Swapping()
    other._values = storage._values
    second = take(other, timeout_s=0)
    with pytest.raises(Fenced):
        first.commit(tuple, "too late")
    second.commit(tuple, "a change")
    second.release()
    first.release()


def test_a_renewal_whose_answer_and_reading_back_are_lost_is_still_ours(storage: Swapping) -> None:
    """The next renewal finds a document that it has not put, and yet nobody else did."""
    first = lease_on(storage, Clock())
    assert first.acquire(0)
    storage.lost = 1
    storage.on_swap = lambda: setattr(storage, "fails", True)
    with pytest.raises(StorageError):
        first.renew()
    storage.on_swap, storage.fails = lambda: None, False
    assert first.renew()
    assert first.renew()
    first.release()
    assert lease_on(storage, Clock()).acquire(0)


def test_a_lease_whose_renewal_is_unsettled_is_freed(storage: Swapping) -> None:
    """A successor need not wait for the end of its life."""
    first = lease_on(storage, Clock())
    assert first.acquire(0)
    storage.lost = 1
    storage.on_swap = lambda: setattr(storage, "fails", True)
    with pytest.raises(StorageError):
        first.renew()
    storage.on_swap, storage.fails = lambda: None, False
    first.release()
    assert lease_on(storage, Clock()).acquire(0)


def test_a_refusal_without_a_successor_loses_nothing(storage: Swapping) -> None:
    """S3 answers 409 while an earlier try of the same renewal is under way; then the old document is still there."""
    first = lease_on(storage, Clock())
    assert first.acquire(0)
    storage.conflicts = 1
    with pytest.raises(StorageError, match="nobody else"):
        first.renew()
    assert first.renew()
    first.release()
