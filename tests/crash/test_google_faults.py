"""Roots on an emulator of Google's store: the lease, and requests of a save going wrong in turn."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
import torch
from accidents import Tell, in_child, killed_at, saved, steps_of
from google_server import google_options, google_storage
from s3_server import FAULTS, Fault, Proxy, When, proxy_to

from ckptman import CheckpointManager, LockTimeout, StorageError
from ckptman.repository import lease
from ckptman.repository.ownership import take
from ckptman.storage.driver import SMALL_NBYTES
from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry

LEAST_REQUESTS = 20
STRIDE = 5


@pytest.fixture(scope="module")
def proxy(google_port: int) -> Iterator[Proxy]:
    with proxy_to(google_port) as proxy:
        yield proxy


@pytest.fixture
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies is succeeded at once: what guards the root here is the catalog alone."""
    monkeypatch.setattr(lease, "LIFE_S", 0.0)


@pytest.mark.usefixtures("_short_leases")
@pytest.mark.parametrize(("fault", "when"), FAULTS, ids=lambda value: value)
def test_requests_of_a_save_on_google_fail_once(google_port: int, proxy: Proxy, fault: Fault, when: When) -> None:
    """Before or after it took effect (every fifth, for time): the save is acknowledged, and what is listed is whole."""
    direct = google_storage(google_port)
    assert saved(direct, 0)
    known = [0]
    for at in range(1 + FAULTS.index((fault, when)) % STRIDE, 200, STRIDE):
        storage = google_storage(proxy.port, direct.url, timeout_s=0.3 if fault == "timeout" else 20)
        proxy.arm(at, fault, when)
        acknowledged = saved(storage, at)
        struck = proxy.struck
        proxy.arm()
        listed = steps_of(direct)
        assert acknowledged
        assert listed == [*known, at][-2:]
        known = listed
        if not struck:
            break
    assert at >= LEAST_REQUESTS


@pytest.mark.usefixtures("_short_leases")
def test_a_process_is_killed_in_mid_save_on_google(google_port: int, proxy: Proxy) -> None:
    """What was acknowledged stays, what was not is whole or absent, and the next save goes on."""
    direct = google_storage(google_port)
    assert saved(direct, 0)
    known = [0]
    for at in range(1, 200, STRIDE):

        def act(tell: Tell, at: int = at) -> None:
            assert saved(google_storage(proxy.port, direct.url), at)
            tell("saved")

        is_saved, struck = killed_at(proxy, at, act)
        listed = steps_of(direct)
        with_it = [*known, at][-2:]
        assert listed in ([with_it] if is_saved else [known, with_it])
        known = listed
        if not struck:
            break
    assert is_saved
    assert at >= LEAST_REQUESTS


def test_a_second_process_waits_for_a_writer_on_google(google_port: int) -> None:
    """It holds the lease, which another is told; one that was closed is succeeded at once."""
    storage = google_storage(google_port)
    with CheckpointManager(storage, {"w": torch.ones(1)}) as manager:
        manager.save(1, block=True)

        def act(tell: Tell) -> None:
            try:
                take(google_storage(google_port, storage.url), timeout_s=0)
            except LockTimeout as error:
                tell(str(error.pid))

        assert in_child(act).told == [str(os.getpid())]
    take(google_storage(google_port, storage.url), timeout_s=0).release()


def test_a_bucket_that_is_not_there_is_named(google_port: int) -> None:
    """Not as a key that is missing, and at once."""
    url = f"gs://no-such-bucket/{secrets.token_hex(6)}"
    storage = ObjectStorage(
        url, storage_options=google_options(google_port), retry=Retry(sleep=lambda seconds: pytest.fail("tried again"))
    )
    with pytest.raises(StorageError, match="bucket does not exist"):
        storage.create("a", b"x")


def test_a_manager_saves_to_google_and_restores(google_port: int) -> None:
    """Files above and below what is put at once; taken over by a second manager."""
    root, options = f"gs://bucket/{secrets.token_hex(6)}", google_options(google_port)
    large, small = torch.rand(SMALL_NBYTES // 2), torch.rand(5)
    with CheckpointManager(root, {"large": large, "small": small}, storage_options=options) as first:
        first.save(1, block=True)
        small.add_(1)
        first.save(2, block=True)
        expected = large.clone(), small.clone()
        with CheckpointManager(root, {"large": large, "small": small}, storage_options=options) as second:
            large.zero_(), small.zero_()
            found = second.restore()
    assert found is not None
    assert found.step == 2
    assert torch.equal(large, expected[0])
    assert torch.equal(small, expected[1])
