"""Large bodies to and from a real S3 server: by our own threads, or as the client itself would send and get them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from s3_server import FAULTS, Fault, Proxy, S3Server, When, proxy_to

from ckptman.storage import s3_upload
from ckptman.storage.base import KeyMissing, StorageError
from ckptman.storage.object import ObjectStorage
from ckptman.storage.parts import Part
from ckptman.storage.s3 import RECEIVED_NBYTES, S3Driver

MIB = 1 << 20
NBYTES = RECEIVED_NBYTES * 5 // 2
DATA = os.urandom(NBYTES)


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with proxy_to(s3_server.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def storage(s3_server: S3Server, proxy: Proxy) -> ObjectStorage:
    storage = s3_server.storage(port=proxy.port, read_timeout_s=1)
    with storage.open_new("f/a") as file:
        file.write(DATA)
    return storage


def test_a_large_range_is_received_by_one_request(storage: ObjectStorage, proxy: Proxy) -> None:
    """The client prepares it and does not send it too."""
    proxy.arm()
    into = memoryview(bytearray(NBYTES - 7))
    assert storage.read_into("f/a", 7, into) == len(into)
    assert into == DATA[7:]
    assert [request.partition(" ")[0] for request in proxy.requests] == ["GET"]


def test_a_range_over_the_end_is_as_long_as_the_object(storage: ObjectStorage) -> None:
    """What lies beyond is left as it was; from the end on there is nothing, and of a missing key less."""
    into = memoryview(bytearray(b"x" * (2 * RECEIVED_NBYTES)))
    assert storage.read_into("f/a", RECEIVED_NBYTES, into) == NBYTES - RECEIVED_NBYTES
    assert into[: NBYTES - RECEIVED_NBYTES] == DATA[RECEIVED_NBYTES:]
    assert set(into[NBYTES - RECEIVED_NBYTES :]) == {ord("x")}
    assert storage.read_into("f/a", NBYTES, into) == 0
    with pytest.raises(KeyMissing):
        storage.read_into("f/none", 0, into)


@pytest.mark.parametrize(("fault", "when"), FAULTS)
def test_a_request_that_fails_is_asked_again(storage: ObjectStorage, proxy: Proxy, fault: Fault, when: When) -> None:
    """Whether there was no answer, or another one: the bytes are right in the end."""
    proxy.arm(1, fault, when)
    into = memoryview(bytearray(NBYTES))
    assert storage.read_into("f/a", 0, into) == NBYTES
    assert into == DATA
    assert proxy.struck == 1


def test_one_request_fills_several_places(storage: ObjectStorage, proxy: Proxy) -> None:
    """One after the other, the last ones less than whole where the object ends; small or large."""
    for start, end in ((7, NBYTES), (NBYTES - 100, NBYTES)):
        proxy.arm()
        into = [memoryview(bytearray(nbytes)) for nbytes in (40, 0, (end - start) // 2, 3, NBYTES)]
        assert storage.read_into_each("f/a", start, into) == end - start
        assert b"".join(into)[: end - start] == DATA[start:end]
        assert not any(b"".join(into)[end - start :])
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("direct", [True, False])
def test_every_part_is_sent_once(
    s3_server: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """By threads that end with the upload, or by the client where it wants that (over TLS)."""
    monkeypatch.setattr(s3_upload, "PART_NBYTES", 5 * MIB)
    if not direct:
        monkeypatch.setattr(S3Driver, "sends_direct", lambda self, path: False)
    storage = s3_server.storage(port=proxy.port)
    storage.create("x", b"")
    data = os.urandom(22 * MIB)
    proxy.arm()
    with storage.open_new("f/parts") as file:
        file.write(data)
        assert bool(senders()) == direct
    assert not senders()
    assert [request.partition(" ")[0] for request in proxy.requests].count("PUT") == 5
    assert storage.read("f/parts", limit=len(data)) == data


def test_an_upload_that_is_dropped_stops_sending(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread goes on, nothing arrives after the abort, and the upload is gone."""
    monkeypatch.setattr(s3_upload, "PART_NBYTES", 5 * MIB)
    storage = s3_server.storage()
    storage.create("x", b"")

    class Stopped(Exception):
        pass

    with pytest.raises(Stopped), storage.open_new("f/dropped") as file:
        file.write(bytes(12 * MIB))
        raise Stopped
    assert not senders()
    driver, root = storage._connected()
    assert not list(driver.uploads(root))  # type: ignore[attr-defined]


def test_bytes_that_change_while_they_are_sent_are_refused(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server compares every part with the digests that it was signed with."""
    monkeypatch.setattr(s3_upload, "PART_NBYTES", 5 * MIB)
    pieces = s3_upload.Parts._pieces

    def changed(self: s3_upload.Parts, part: Part) -> Iterator[memoryview]:
        part.bytes[100] ^= 1
        return pieces(self, part)

    monkeypatch.setattr(s3_upload.Parts, "_pieces", changed)
    monkeypatch.setattr(S3Driver, "call", refused)
    storage = s3_server.storage()
    with pytest.raises(StorageError, match="only by itself"), storage.open_new("f/changed") as file:
        file.write(bytes(6 * MIB))


def refused(self: S3Driver, method: str, path: str, **arguments: object) -> object:
    """The client, which would send the part again by itself."""
    if method == "upload_part":
        raise StorageError("only by itself")
    return self.wait(self.begin(method, path, **arguments))


def senders() -> int:
    return len([thread for thread in threading.enumerate() if thread.name.startswith("ckptman-send")])
