"""A put that got no answer, and takes effect when its writer has gone on: the network keeps no promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from azurite import azure_storage
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from s3_server import Fault, Proxy, S3Server, proxy_to

from ckptman import CheckpointManager, keep
from ckptman.errors import CommitUnknown, StorageError
from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry


class Late(MemoryFileSystem):  # type: ignore[misc]
    """
    A store whose create-only puts exclude; those of the catalog get no answer while it is *slow*, and land later.

    With a *refusal*, only the first of them does, and the others are refused.
    """

    cachable = False

    def __init__(self) -> None:
        super().__init__(global_store=False)
        self.is_slow = False
        self.refusal: Exception | None = None
        self.under_way: list[tuple[str, bytes]] = []

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        if self.is_slow and "/catalog/" in path:
            if self.under_way and self.refusal:
                raise self.refusal
            self.under_way.append((path, value))
            raise TimeoutError
        if mode == "create" and self.store.setdefault(path, file := MemoryFile(self, path, value)) is not file:
            raise FileExistsError(path)

    def land(self) -> None:
        """What was under way arrives; of several the first one wins."""
        self.is_slow = False
        for path, value in self.under_way:
            self.store.setdefault(path, MemoryFile(self, path, value))


@pytest.mark.parametrize("refusal", [None, PermissionError("the token has expired")], ids=["silence", "refusal"])
def test_a_commit_that_lands_after_it_was_given_up_lists_what_is_there(refusal: Exception | None) -> None:
    """
    The record drops step 1 and lists step 2. Were step 2 called failed and its files deleted, then this record,
    landing later, would leave neither: the next writer sweeps what it does not list.
    """
    store = Late()
    root = ObjectStorage("memory://late", filesystem=lambda: store, retry=Retry(tries=2, sleep=lambda seconds: None))
    state = {"weight": torch.ones(3)}
    with CheckpointManager(root, state, keep=keep.last(1)) as manager:
        manager.save(1, block=True)
        store.is_slow, store.refusal = True, refusal
        state["weight"].fill_(2)
        with pytest.raises(CommitUnknown, match="may still come"):
            manager.save(2, block=True)
        store.land()
    with CheckpointManager(root, state, keep=keep.last(1)) as manager:
        manager.tag(2, "x")  # takes the root over, and sweeps
        state["weight"].fill_(0)
        found = manager.restore()
        assert found is not None
        assert (found.step, found.skipped) == (2, ())
        assert state["weight"].tolist() == [2, 2, 2]


@pytest.fixture(params=["s3", "azure"])
def proxied(request: pytest.FixtureRequest) -> Iterator[tuple[ObjectStorage, Proxy]]:
    """A storage on a real server, and the proxy through which it is reached."""
    is_s3 = request.param == "s3"
    upstream = request.getfixturevalue("s3_server").port if is_s3 else request.getfixturevalue("azure_port")
    with proxy_to(upstream) as proxy:
        yield S3Server(port=upstream).storage(port=proxy.port) if is_s3 else azure_storage(proxy.port), proxy


def test_no_client_sends_a_put_again_behind_our_back(proxied: tuple[ObjectStorage, Proxy]) -> None:
    """
    The connection is cut while a record's put is under way, and a later one is refused: the first may still land.

    aiohttp sends a PUT again by itself when a connection that it kept is cut. Were that let happen, the refusal would
    be the only answer that is seen, and the put would count as one that can never take effect.
    """
    storage, proxy = proxied
    storage.create("a", b"")
    faults: list[Fault] = ["cut", "403"]

    def strike() -> None:
        proxy.fault = faults.pop(0) if len(faults) > 1 else faults[0]

    proxy.arm(1, "cut", "before", lasting=True, strike=strike)
    with pytest.raises(StorageError) as caught:
        storage.create("b", b"x")
    assert "may not create" in str(caught.value)
    assert caught.value.may_take_effect
    assert [request.partition(" ")[0] for request in proxy.requests] == ["PUT", "PUT", "HEAD"]
