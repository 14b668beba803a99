"""Roots on Azure's emulator: blocks, the lease, and every request of a save going wrong in turn."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accidents import Tell, in_child
from azurite import KEY, connection_to
from s3_server import Fault, Proxy, When, proxy_to

from ckptman import CheckpointManager, CkptmanError, CommitUnknown, LockTimeout, StorageError, keep
from ckptman.repository import lease
from ckptman.repository.ownership import take
from ckptman.storage import azure
from ckptman.storage.base import KeyExists
from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry

adlfs = pytest.importorskip("adlfs", reason="needs the extra azure")

MIB = 1 << 20


@functools.cache
def client_of(port: int) -> Any:
    return adlfs.AzureBlobFileSystem(
        connection_string=connection_to(port), skip_instance_cache=True, use_listings_cache=False
    )


def storage_at(port: int, root: str | None = None) -> ObjectStorage:
    return ObjectStorage(
        root or f"abfs://bucket/{secrets.token_hex(6)}",
        filesystem=lambda: client_of(port),
        retry=Retry(sleep=lambda seconds: None),
    )


@pytest.fixture(scope="module")
def proxy(azure_port: int) -> Iterator[Proxy]:
    with proxy_to(azure_port) as proxy:
        yield proxy


def save(storage: ObjectStorage, step: int) -> bool | None:
    """Whether a save of *step* was acknowledged; None if nobody knows."""
    with CheckpointManager(storage, {"w": torch.full((9,), float(step))}, keep=keep.last(2), rng=False) as manager:
        try:
            manager.save(step, block=True)
        except CommitUnknown:
            return None
        except CkptmanError as error:
            print(f"step {step}: {error}")
            return False
        return True


def steps_of(storage: ObjectStorage) -> list[int]:
    found = torch.zeros(9)
    with CheckpointManager(storage, {"w": found}, rng=False) as manager:
        steps = [checkpoint.step for checkpoint in manager.checkpoints()]
        manager.restore()
    assert torch.equal(found, torch.full((9,), float(steps[-1])))
    return steps


@pytest.mark.parametrize(("fault", "when", "stride"), [("503", "before", 4), ("cut", "after", 2)])
def test_requests_of_a_save_on_azure_fail_once(
    azure_port: int, proxy: Proxy, fault: Fault, when: When, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after it took effect (some, for time): sent again, acknowledged, and what is listed is whole."""
    monkeypatch.setattr(lease, "LIFE_S", 0.0)
    direct = storage_at(azure_port)
    assert save(direct, 0)
    known = [0]
    for at in range(1, 200, stride):
        proxy.arm(at, fault, when)
        acknowledged = save(storage_at(proxy.port, direct.url), at)
        struck = proxy.struck
        proxy.arm()
        listed = steps_of(direct)
        assert acknowledged
        assert listed == [*known, at][-2:]
        known = listed
        if not struck:
            break
    assert at >= 20


def test_a_file_goes_in_blocks_and_is_committed_create_only(
    azure_port: int, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in order; nobody sees it before; of two uploads of one key the second to be committed is refused."""
    monkeypatch.setattr(azure, "BLOCK_NBYTES", MIB)
    first = storage_at(proxy.port)
    second = storage_at(azure_port, first.url)
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
    storage = storage_at(azure_port)
    for nbytes in (1, 390 << 30, 5 << 40):
        with storage.open_new("f/a") as file:
            file.expect(nbytes)
            assert nbytes <= 50_000 * file._held._block_nbytes  # type: ignore[attr-defined]
            file.abort()
    with pytest.raises(StorageError, match="190 TiB"), storage.open_new("f/a") as file:
        file.expect(200 << 40)


def test_a_second_process_waits_for_a_writer_on_azure(azure_port: int) -> None:
    """It holds the lease, which another is told; one that was closed is succeeded at once."""
    storage = storage_at(azure_port)
    with CheckpointManager(storage, {"w": torch.ones(1)}) as manager:
        manager.save(1, block=True)

        def act(tell: Tell) -> None:
            client_of.cache_clear()
            try:
                take(storage_at(azure_port, storage.url), timeout_s=0)
            except LockTimeout as error:
                tell(str(error.pid))

        assert in_child(act).told == [str(os.getpid())]
    take(storage_at(azure_port, storage.url), timeout_s=0).release()


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
