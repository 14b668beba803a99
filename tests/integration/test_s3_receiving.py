"""Large ranges from a real S3 server: straight into the caller's memory, or as the client itself would get them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from s3_server import FAULTS, Fault, Proxy, S3Server, When, proxy_to

from ckptman.storage.base import KeyMissing
from ckptman.storage.object import ObjectStorage
from ckptman.storage.s3 import RECEIVED_NBYTES

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
