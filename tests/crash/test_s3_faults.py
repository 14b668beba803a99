"""Every request of a save on a real S3 server goes wrong in turn, or is the last one of its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from accidents import Child, Run, Tell, in_child, killed_at, listing, saved, steps_of
from s3_server import FAULTS, Fault, Proxy, S3Server, When, proxy_to

from ckptman import CheckpointManager, Fenced, LockTimeout
from ckptman.repository import lease
from ckptman.repository.ownership import take
from ckptman.storage import s3_upload
from ckptman.storage.base import KeyMissing, StorageError
from ckptman.storage.object import ObjectStorage

LEAST_REQUESTS = 26
MIB = 1 << 20


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with proxy_to(s3_server.port) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that dies is succeeded at once: what guards the root here is the catalog alone."""
    monkeypatch.setattr(lease, "LIFE_S", 0.0)


covered: dict[tuple[Fault, When], int] = {}


@pytest.mark.parametrize(("fault", "when"), FAULTS, ids=lambda value: value)
def test_every_request_of_a_save_fails_once(s3_server: S3Server, proxy: Proxy, fault: Fault, when: When) -> None:
    """Before or after it took effect: the save commits or raises, never lies, and what is listed is whole."""
    direct = s3_server.storage()
    root = direct.url
    assert saved(direct, 0)
    known = [0]
    for at in range(1, 200):
        storage = s3_server.storage(root, port=proxy.port, read_timeout_s=0.2 if fault == "timeout" else 20)
        proxy.arm(at, fault, when)
        acknowledged = saved(storage, at)
        struck = proxy.struck
        proxy.arm()
        listed = steps_of(direct)
        with_it = [*known, at][-2:]
        assert listed in ([known, with_it] if acknowledged is None else [with_it if acknowledged else known])
        assert acknowledged is not False, "a request that fails once is sent again"
        known = listed
        if not struck:
            break
        covered[fault, when] = covered.get((fault, when), 0) + 1
    assert at >= LEAST_REQUESTS


def test_the_sweep_did_not_shrink() -> None:
    """At least 200 faults were struck, in all nine ways."""
    if set(covered) != set(FAULTS):
        pytest.skip("counts what the whole sweep covered")
    print(f"{sum(covered.values())} faults: {covered}")
    assert sum(covered.values()) >= 200


@pytest.mark.parametrize(("fault", "when"), [("503", "before"), ("cut", "after")], ids=lambda value: value)
def test_every_request_fails_from_some_on(s3_server: S3Server, proxy: Proxy, fault: Fault, when: When) -> None:
    """The same for a server that goes away in the middle of a save, and stays away until it has failed."""
    direct = s3_server.storage()
    assert saved(direct, 0)
    known, answers = [0], set()
    for at in range(1, 200, 2):
        storage = s3_server.storage(direct.url, port=proxy.port)
        proxy.arm(at, fault, when, lasting=True)
        acknowledged = saved(storage, at)
        struck = proxy.struck
        proxy.arm()
        listed = steps_of(direct)
        with_it = [*known, at][-2:]
        assert listed in ([known, with_it] if acknowledged is None else [with_it if acknowledged else known])
        known = listed
        answers.add(acknowledged)
        if not struck:
            break
    assert at >= LEAST_REQUESTS
    assert answers == {True, False, None}


@pytest.mark.parametrize(("fault", "when"), FAULTS[:6], ids=lambda value: value)
def test_every_request_of_an_upload_fails(
    s3_server: S3Server, proxy: Proxy, fault: Fault, when: When, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an upload in three parts: it is there whole, though every request in turn fails once; nothing is left open."""
    monkeypatch.setattr(s3_upload, "PART_NBYTES", 5 * MIB)
    direct = s3_server.storage()
    storage = s3_server.storage(direct.url, port=proxy.port)
    storage.create("x", b"")
    data = bytes(range(256)) * (11 * MIB // 256)
    for at in range(1, 20):
        proxy.arm(at, fault, when)
        with storage.open_new(f"f/{at}") as file:
            file.write(data)
        struck = proxy.struck
        proxy.arm()
        assert direct.read(f"f/{at}", limit=len(data)) == data
        if not struck:
            break
    assert at == 6  # create, three parts, complete, and once nothing
    assert open_uploads(direct) == (1 if (fault, when) in {("503", "after"), ("429", "after"), ("cut", "after")} else 0)


@pytest.mark.parametrize("at", range(1, 6))
def test_an_upload_that_fails_is_aborted(
    s3_server: S3Server, proxy: Proxy, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes away during any request: an error, no object, and what was uploaded is dropped or swept later."""
    monkeypatch.setattr(s3_upload, "PART_NBYTES", 5 * MIB)
    direct = s3_server.storage()
    storage = s3_server.storage(direct.url, port=proxy.port)
    storage.create("x", b"")
    proxy.arm(at, "503", "before", lasting=True)
    with pytest.raises(StorageError, match="also when asked again"), storage.open_new("f/a") as file:
        file.write(bytes(11 * MIB))
    proxy.arm()
    with pytest.raises(KeyMissing):
        direct.size("f/a")
    monkeypatch.setattr("ckptman.storage.s3.STALE", -timedelta(days=1))
    s3_server.storage(direct.url).remove_temporaries("")
    assert open_uploads(direct) == 0


def open_uploads(storage: ObjectStorage) -> int:
    driver, root = storage._connected()
    return len(list(driver.uploads(root)))  # type: ignore[attr-defined]


def test_a_process_is_killed_at_every_request(s3_server: S3Server, proxy: Proxy) -> None:
    """What was acknowledged stays, what was not is whole or absent, and the next save goes on."""
    direct = s3_server.storage()
    assert saved(direct, 0)
    known = [0]
    for at in range(1, 200):

        def act(tell: Tell, at: int = at) -> None:
            assert saved(s3_server.storage(direct.url, port=proxy.port), at)
            tell("saved")

        is_saved, struck = killed_at(proxy, at, act)
        listed = steps_of(direct)
        with_it = [*known, at][-2:]
        assert listed in ([with_it] if is_saved else [known, with_it])
        known = listed
        if not struck:
            break
    assert is_saved
    assert at > LEAST_REQUESTS


def test_a_writer_that_slept_beyond_its_lease_is_fenced(s3_server: S3Server, proxy: Proxy) -> None:
    """Stopped, succeeded, and woken up: its next save raises Fenced, and its checkpoint is not there."""
    root = s3_server.storage().url

    def act(tell: Tell) -> None:
        run = Run(s3_server.storage(root, port=proxy.port))
        run.save(1, 1)
        tell("ready")
        run.save(2, 2)
        signal.pause()

    def sleeper(tell: Tell) -> None:
        try:
            act(tell)
        except Fenced:
            tell("fenced")

    proxy.arm()
    with Child(sleeper) as first:
        assert first.hear() == "ready"
        first.send(signal.SIGSTOP)
        assert first.wait_until_stopped()
        second = Run(s3_server.storage(root))
        second.save(3, 3)
        first.send(signal.SIGCONT)
        assert first.hear() == "fenced"
    second.save(4, 4)
    second.manager.close()
    assert listing(s3_server.storage(root)) == "1:1 3:3 4:4"


def test_a_child_is_not_the_writer(s3_server: S3Server) -> None:
    """A forked child makes a client of its own, reads, and neither saves nor frees the lease of its parent."""
    run = Run(s3_server.storage())
    run.save(1, 1)

    def act(tell: Tell) -> None:
        tell(listing(run.manager._storage))
        try:
            run.save(2, 2)
        except Fenced:
            tell("fenced")
        run.manager.close()

    assert in_child(act).told == ["1:1", "fenced"]
    run.save(3, 3)
    run.manager.close()


def test_a_second_process_waits_for_the_first(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds the lease: LockTimeout says who; a process that ends in good order frees it."""
    monkeypatch.undo()
    storage = s3_server.storage()
    with CheckpointManager(storage, {"w": torch.ones(1)}) as manager:
        manager.save(1, block=True)

        def act(tell: Tell) -> None:
            try:
                take(s3_server.storage(storage.url), timeout_s=0)
            except LockTimeout as error:
                tell(str(error.pid))

        assert in_child(act).told == [str(os.getpid())]
    program = f"""
from ckptman.repository.ownership import take
from ckptman.storage.opening import open_storage
owner = take(open_storage({storage.url!r}, storage_options={s3_server.options!r}), timeout_s=0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    take(s3_server.storage(storage.url), timeout_s=0).release()
