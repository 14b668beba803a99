"""Roots on Azure's emulator: blocks, the lease, and every request of a save going wrong in turn."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
import torch
from accidents import Tell, in_child, killed_at, saved, steps_of
from azurite import KEY, azure_storage, connection_to
from s3_server import FAULTS, Fault, Proxy, When, proxy_to

from ckptman import CheckpointManager, LockTimeout, StorageError
from ckptman.repository import lease
from ckptman.repository.ownership import take
from ckptman.storage import azure
from ckptman.storage.base import KeyExists
from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry

adlfs = pytest.importorskip("adlfs", reason="needs the extra azure")

LEAST_REQUESTS = 20
STRIDE = 5
MIB = 1 << 20


@pytest.fixture(scope="module")
def proxy(azure_port: int) -> Iterator[Proxy]:
    with proxy_to(azure_port) as proxy:
        yield proxy


@pytest.fixture
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies is succeeded at once: what guards the root here is the catalog alone."""
    monkeypatch.setattr(lease, "LIFE_S", 0.0)


@pytest.mark.usefixtures("_short_leases")
@pytest.mark.parametrize(("fault", "when"), FAULTS, ids=lambda value: value)
def test_requests_of_a_save_on_azure_fail_once(azure_port: int, proxy: Proxy, fault: Fault, when: When) -> None:
    """
    Before or after it took effect: sent again, acknowledged, and what is listed is whole.

    Every kind of fault strikes every fifth request, and each request is struck by at least one of the kinds: for time.
    """
    direct = azure_storage(azure_port)
    assert saved(direct, 0)
    known = [0]
    for at in range(1 + FAULTS.index((fault, when)) % STRIDE, 200, STRIDE):
        storage = azure_storage(proxy.port, direct.url, read_timeout_s=0.3 if fault == "timeout" else 20)
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
def test_a_process_is_killed_in_mid_save_on_azure(azure_port: int, proxy: Proxy) -> None:
    """At every fifth request: what was acknowledged stays, what was not is whole or absent, the next save goes on."""
    direct = azure_storage(azure_port)
    assert saved(direct, 0)
    known = [0]
    for at in range(1, 200, STRIDE):

        def act(tell: Tell, at: int = at) -> None:
            assert saved(azure_storage(proxy.port, direct.url), at)
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


def test_a_file_goes_in_blocks_and_is_committed_create_only(
    azure_port: int, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in order; nobody sees it before; of two uploads of one key the second to be committed is refused."""
    monkeypatch.setattr(azure, "BLOCK_NBYTES", MIB)
    first = azure_storage(proxy.port)
    second = azure_storage(azure_port, first.url)
    first.create("a", b"")
    data = bytes(range(256)) * (5 * MIB // 512)
    proxy.arm()
    with pytest.raises(KeyExists), second.open_new("f/a") as loser:
        loser.write(bytes(2 * MIB))
        with first.open_new("f/a") as winner:
            winner.write(data)
            assert second.listing("f") == []
    assert sum("comp=block&" in request or request.endswith("comp=block") for request in proxy.requests) == 3
    assert first.read("f/a", limit=len(data)) == data
    into = bytearray(MIB)
    assert first.read_into("f/a", len(data) - 7, memoryview(into)) == 7
    assert first.read_into("f/a", len(data), memoryview(into)) == 0


def test_what_azure_cannot_hold_is_refused_before_anything_is_sent(azure_port: int) -> None:
    """And up to there blocks are large enough for 50,000 of them to do."""
    storage = azure_storage(azure_port)
    for nbytes in (1, 390 << 30, 5 << 40):
        with storage.open_new("f/a") as file:
            file.expect(nbytes)
            assert nbytes <= 50_000 * file._held._block_nbytes  # type: ignore[attr-defined]  # no outsider may ask
            file.abort()
    with pytest.raises(StorageError, match="190 TiB"), storage.open_new("f/a") as file:
        file.expect(200 << 40)


def test_a_second_process_waits_for_a_writer_on_azure(azure_port: int) -> None:
    """It holds the lease, which another is told; one that was closed is succeeded at once."""
    storage = azure_storage(azure_port)
    with CheckpointManager(storage, {"w": torch.ones(1)}) as manager:
        manager.save(1, block=True)

        def act(tell: Tell) -> None:
            try:
                take(azure_storage(azure_port, storage.url), timeout_s=0)
            except LockTimeout as error:
                tell(str(error.pid))

        assert in_child(act).told == [str(os.getpid())]
    take(azure_storage(azure_port, storage.url), timeout_s=0).release()


def test_errors_of_azure_say_what_to_do(azure_port: int) -> None:
    """A wrong key, and a container that is not there; neither shows the key."""
    wrong = connection_to(azure_port).replace(KEY, "d3Jvbmctd3Jvbmctd3Jvbmc=")
    once = Retry(sleep=lambda seconds: None)
    for options, container, says in (
        (wrong, "bucket", "credentials"),
        (connection_to(azure_port), "no-such", "bucket does not exist"),
    ):
        storage = ObjectStorage(f"abfs://{container}/x", storage_options={"connection_string": options}, retry=once)
        for call in (lambda: storage.listing(""), lambda: storage.create("a", b"x")):  # noqa: B023 - called at once
            with pytest.raises(StorageError, match=says) as caught:
                call()
            assert KEY not in str(caught.value)
            assert "d3Jvbmct" not in str(caught.value)


def test_a_manager_saves_to_azure_and_restores(azure_port: int) -> None:
    """Files above and below what is put at once; taken over by a second manager; nothing secret in what it says."""
    root, options = f"abfs://bucket/{secrets.token_hex(6)}", {"connection_string": connection_to(azure_port)}
    large, small = torch.rand(4 << 20), torch.rand(5)
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
    assert KEY not in repr(first) + repr(found)
