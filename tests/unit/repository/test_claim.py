"""Taking a root on a thread, beside the staging of a first save."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ckptman.errors import LockTimeout
from ckptman.repository.claim import Claim
from ckptman.repository.file_lock import RootLock
from ckptman.repository.ownership import Ownership, take
from ckptman.storage.base import Storage
from ckptman.storage.opening import open_storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path / "root")
    take(storage, timeout_s=0).release()
    return storage


def claim_to(storage: Storage, taken: list[tuple[Ownership, threading.Thread]], timeout_s: float = 30) -> Claim:
    return Claim(
        storage,
        timeout_s=timeout_s,
        on_succession=lambda: None,
        on_taken=lambda owner: taken.append((owner, threading.current_thread())),
    )


def locked_by_another(storage: Storage) -> RootLock:
    assert storage.lock_path is not None
    other = RootLock(storage.lock_path)
    assert other.acquire(0)
    return other


def taking() -> threading.Thread:
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "ckptman-claim"]
    return thread


def test_what_was_begun_is_taken_once_and_told_of_by_the_caller(storage: Storage) -> None:
    """Begun or not, there is one owner, and whoever asks for it says so, on its own thread."""
    taken: list[tuple[Ownership, threading.Thread]] = []
    claim = claim_to(storage, taken)
    claim.begin()
    claim.begin()
    owner = claim.owner()
    claim.begin()
    assert claim.owner() is owner
    assert taken == [(owner, threading.current_thread())]
    claim.release()
    locked_by_another(storage).release()


def test_a_failure_is_raised_to_the_caller_and_the_next_call_tries_again(storage: Storage) -> None:
    """Another writer is alive: the caller hears of it, and becomes the writer once that one has gone."""
    other = locked_by_another(storage)
    claim = claim_to(storage, [], timeout_s=0.01)
    claim.begin()
    with pytest.raises(LockTimeout):
        claim.owner()
    other.release()
    claim.owner()
    claim.release()


def test_what_is_taken_after_the_release_is_let_go(storage: Storage) -> None:
    """A manager is closed while it waits for the lock: that returns at once, and the lock is not kept."""
    other = locked_by_another(storage)
    claim = claim_to(storage, [])
    claim.begin()
    thread = taking()
    claim.release()
    assert thread.is_alive()
    other.release()
    thread.join(30)
    locked_by_another(storage).release()


def test_a_root_of_this_process_is_taken_over_by_the_calling_thread(storage: Storage) -> None:
    """The first owner's saves must be finished, which only the thread that trains may do."""
    drained: list[threading.Thread] = []
    take(storage, timeout_s=0, on_succession=lambda: drained.append(threading.current_thread()))
    claim = claim_to(storage, [])
    claim.begin()
    claim.owner()
    assert drained == [threading.current_thread()]
    claim.release()
