"""What a save and a restore ask of an S3 server: no more than they need, and not one after the other where they may."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from s3_server import Proxy, S3Server, proxy_to

from ckptman import CheckpointManager, SaveFailed
from ckptman.storage import s3_upload
from ckptman.storage.object import ObjectStorage

MIB = 1 << 20
FILES = 5


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with proxy_to(s3_server.port) as proxy:
        yield proxy


@pytest.fixture
def manager(s3_server: S3Server, proxy: Proxy) -> Iterator[CheckpointManager]:
    """Of `FILES` small components; the root has its writer, and step 1."""
    state = {f"part{number}": {"w": torch.full((1000,), float(number))} for number in range(FILES)}
    with CheckpointManager(s3_server.storage(port=proxy.port), state, rng=False) as manager:
        manager.save(1, block=True)
        yield manager


@pytest.fixture
def large(s3_server: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointManager]:
    """Of two components of three parts each."""
    monkeypatch.setattr(s3_upload, "PART_NBYTES", 5 * MIB)
    state = {name: {"w": torch.randn(3 * MIB)} for name in ("first", "second")}
    with CheckpointManager(s3_server.storage(port=proxy.port), state, rng=False) as manager:
        manager.save(1, block=True)
        for component in state.values():
            component["w"] += 1
        yield manager


def methods(requests: Sequence[str]) -> Counter[str]:
    return Counter(request.partition(" ")[0] for request in requests)


def test_a_restore_asks_for_each_file_twice_and_never_for_its_size(manager: CheckpointManager, proxy: Proxy) -> None:
    """One LIST, the record, the manifest; then of each small file its header, and the rest."""
    proxy.arm()
    assert manager.restore(1) is not None
    assert methods(proxy.requests) == {"GET": 3 + 2 * FILES}


def test_a_save_of_small_files_takes_one_request_for_each_and_five(manager: CheckpointManager, proxy: Proxy) -> None:
    """The five: the manifest, the record, the newest record before it, and a LIST before and after."""
    for component in manager._state.values():
        component["w"] += 1  # type: ignore[index]
    proxy.arm()
    manager.save(2, block=True)
    assert methods(proxy.requests) == {"PUT": FILES + 2, "GET": 3}


def test_a_file_is_completed_while_the_next_one_is_sent(large: CheckpointManager, proxy: Proxy) -> None:
    """The answer to the completion of the first waits for a request about the second, so they do not wait in turn."""
    is_begun = threading.Event()
    count, waited = proxy.count, []

    def watched(request: str) -> bool:
        if "/second." in request:
            is_begun.set()
        if request.startswith("POST") and "/first." in request and "uploadId=" in request:
            waited.append(is_begun.wait(5))
        return count(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Proxy, "count", lambda self, request: watched(request))
        large.save(2, block=True)
    assert waited == [True]
    assert large.restore(2) is not None


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_completion_that_is_refused_fails_the_save(large: CheckpointManager, proxy: Proxy, name: str) -> None:
    """Behind the next file, or as the last one: nothing is listed, and nothing is left on the server."""
    storage = large._storage
    assert isinstance(storage, ObjectStorage)
    before = [stored.key for stored in storage.listing("")]
    proxy.arm()
    count = proxy.count

    def refused(request: str) -> bool:
        if request.startswith("POST") and f"/{name}." in request and "uploadId=" in request:
            proxy.arm(1, "403")
        return count(request)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SaveFailed, match=name):
        patch.setattr(Proxy, "count", lambda self, request: refused(request))
        large.save(2, block=True)
    proxy.arm()
    assert [stored.key for stored in storage.listing("")] == before
    driver, root = storage._connected()
    assert not list(driver.uploads(root))  # type: ignore[attr-defined]
    large.save(3, block=True)


def test_uploads_at_the_same_time_never_wait_for_each_other(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what may be on its way is shared, one thread can write several, piece by piece in turn."""
    monkeypatch.setattr(s3_upload, "PART_NBYTES", 5 * MIB)
    monkeypatch.setattr(s3_upload, "IN_FLIGHT_NBYTES", 5 * MIB)
    storage, data = s3_server.storage(), os.urandom(13 * MIB)
    storage.create("x", b"")
    files = [storage.open_new(f"f/{number}") for number in range(3)]
    for start in range(0, len(data), 3 * MIB):
        for file in files:
            file.write(data[start : start + 3 * MIB])
    for file in files:
        file.commit()
    for number in range(3):
        assert storage.read(f"f/{number}", limit=len(data)) == data
    assert storage._connected()[0].in_flight.has_room(5 * MIB)  # type: ignore[attr-defined]
