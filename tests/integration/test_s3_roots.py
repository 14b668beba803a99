"""A root on a real S3 server: saved, restored, raced for, listed cheaply, and refused with a reason."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from s3_server import ACCESS, BUCKET, SECRET, Proxy, S3Server, proxy_to

from ckptman import CheckpointManager, StorageError
from ckptman.cli._group import ckptman
from ckptman.storage.base import KeyExists
from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry

AT_ONCE = Retry(sleep=lambda seconds: None)
MIB = 1 << 20


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with proxy_to(s3_server.port) as proxy:
        yield proxy


def test_a_manager_saves_and_restores(s3_server: S3Server) -> None:
    """A root on S3 gives every bit back, to a manager that knows only its URL; a successor need not wait."""
    root, weight = s3_server.new_root(), torch.randn(700, 900)
    with CheckpointManager(root, {"w": weight.clone()}, storage_options=s3_server.options) as manager:
        assert manager.restore() is None
        manager.save(3, block=True)
        assert "ckptman-lease" in {thread.name for thread in threading.enumerate()}
    assert "ckptman-lease" not in {thread.name for thread in threading.enumerate()}
    found = torch.zeros(700, 900)
    with CheckpointManager(root, {"w": found}, storage_options=s3_server.options, lock_timeout=0) as manager:
        restored = manager.restore()
        manager.save(4)
    assert restored is not None
    assert restored.step == 3
    assert torch.equal(found, weight)


def test_a_large_object_goes_in_parts(s3_server: S3Server, proxy: Proxy) -> None:
    """70 MiB are five parts, whole and in order; a second one of that name is refused, and leaves no upload."""
    storage = s3_server.storage(port=proxy.port)
    storage.create("a", b"x")
    proxy.arm()
    pieces = [bytes([number]) * (7 * MIB) for number in range(10)]
    with storage.open_new("f/large") as file:
        file.expect(70 * MIB)
        for piece in pieces:
            file.write(piece)
    assert sum("partNumber=" in request for request in proxy.requests) == 5
    into = bytearray(70 * MIB)
    assert storage.read_into("f/large", 0, memoryview(into)) == len(into)
    assert into == b"".join(pieces)
    with pytest.raises(KeyExists), storage.open_new("f/large") as file:
        for piece in pieces[:3]:
            file.write(piece)
    with pytest.raises(ZeroDivisionError), storage.open_new("f/other") as file:
        for piece in pieces[:3]:
            file.write(piece)
        raise ZeroDivisionError
    driver, root = storage._connected()
    assert list(driver.uploads(root)) == []  # type: ignore[attr-defined]
    assert [stored.key for stored in storage.listing("f")] == ["f/large"]


def test_what_s3_cannot_hold_is_refused_before_anything_is_sent(s3_server: S3Server, proxy: Proxy) -> None:
    """More than 5 TiB under one key; and up to there, parts are large enough for 10,000 of them to do."""
    storage = s3_server.storage(port=proxy.port)
    storage.create("a", b"x")
    proxy.arm()
    for nbytes, part_nbytes in ((1, 16 * MIB), (156 << 30, 16 * MIB), (625 << 30, 64 * MIB), (5 << 40, 525 * MIB)):
        with storage.open_new("f/a") as file:
            file.expect(nbytes)
            assert file._held._part_nbytes == part_nbytes  # type: ignore[attr-defined]
            assert nbytes <= 10_000 * part_nbytes
            file.abort()
    with pytest.raises(StorageError, match="5 TiB"), storage.open_new("f/a") as file:
        file.expect((5 << 40) + 1)
    assert proxy.requests == []


def test_an_upload_takes_64_mib(s3_server: S3Server) -> None:
    """
    Whatever its size: 160 MiB go out, and the process never holds more than 64 MiB and a little of them.

    The next one takes as much, no more: nothing of the first is left, though nobody looked for cyclic garbage.
    """
    storage = s3_server.storage()
    piece = os.urandom(MIB)
    with storage.open_new("f/warm") as file:
        file.write(piece)
    nbytes, is_over, peak = 160 * MIB, threading.Event(), 0

    def look() -> None:
        nonlocal peak
        while not is_over.wait(0.01):
            peak = max(peak, resident())

    looker = threading.Thread(target=look)
    before = resident()
    looker.start()
    gc.disable()
    try:
        for name in ("f/a", "f/b"):
            with storage.open_new(name) as file:
                for _ in range(nbytes // 2 // MIB):
                    file.write(piece)
    finally:
        gc.enable()
    is_over.set()
    looker.join()
    assert storage.size("f/a") == storage.size("f/b") == nbytes // 2
    assert peak - before <= 80 * MIB, f"{(peak - before) / MIB:.0f} MiB"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_listing_a_thousand_checkpoints_takes_two_requests(s3_server: S3Server, proxy: Proxy) -> None:
    """One page of LIST and one GET, however many there are; the command line has its credentials from variables."""
    storage = s3_server.storage(port=proxy.port)
    with CheckpointManager(storage, {"w": torch.ones(1)}, rng=False) as manager:
        manager.save(0, block=True)
        owner = manager._claim.owner()
        entry = owner.newest.checkpoints[0]
        copies = [msgspec.structs.replace(entry, step=step, attempt=named(entry.attempt, step)) for step in range(1000)]
        owner.commit(lambda entries: copies, "a thousand")
    environment = {
        "AWS_ACCESS_KEY_ID": ACCESS,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
    }
    proxy.arm()
    done = CliRunner().invoke(ckptman, ["ls", storage.url, "--json"], env=environment)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["checkpoints"]) == 1000
    assert [request.partition("?")[0].partition(" ")[0] for request in proxy.requests] == ["GET", "GET"]
    assert "list-type=2" in proxy.requests[0]
    assert "/catalog/" in proxy.requests[1]


def named(attempt: str, step: int) -> str:
    return f"step-{step:012d}{attempt[17:]}"


def test_one_of_eight_processes_creates_a_key(s3_server: S3Server) -> None:
    """Eight processes create one key at once: one has it, seven know that they have not."""
    root = s3_server.storage().url
    program = f"""
import sys
from ckptman.storage.base import KeyExists
from ckptman.storage.object import ObjectStorage
import os
def race(number, ready, go):
    storage = ObjectStorage({root!r}, storage_options={s3_server.options!r}, single_writer=True)
    storage.listing("")
    os.write(ready, b"x"); os.read(go, 1)
    try:
        storage.create("catalog/1", b"%d" % number)
    except KeyExists:
        os._exit(1)
    os._exit(0)
import s3fs
ready, go = os.pipe(), os.pipe()
pids = []
for number in range(8):
    pid = os.fork()
    if not pid: race(number, ready[1], go[0])
    pids.append(pid)
for pid in pids: os.read(ready[0], 1)
os.write(go[1], b"x" * 8)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    codes = json.loads(ran.stdout)
    assert sorted(codes) == [0] + [1] * 7
    assert s3_server.storage(root).read("catalog/1", limit=9) == b"%d" % codes.index(0)


WRONG: list[tuple[dict[str, str], str, str]] = [
    ({"secret": "another-canary-secret"}, BUCKET, r"credentials are wrong.*storage_options"),
    ({"key": "canary-nobody"}, BUCKET, r"credentials are wrong.*storage_options"),
    ({"key": f"{ACCESS}-2"}, BUCKET, r"may not list here: permit it \(s3:ListBucket on S3\)"),
    ({}, "no-such-bucket", "bucket does not exist: create it"),
    ({"endpoint_url": "http://127.0.0.1:9"}, BUCKET, "did not answer"),
]


@pytest.mark.parametrize(("wrong", "bucket", "says"), WRONG, ids=["secret", "key", "list", "bucket", "server"])
def test_errors_say_what_to_do(
    s3_server: S3Server, caplog: pytest.LogCaptureFixture, wrong: dict[str, str], bucket: str, says: str
) -> None:
    """Each says which it is and what may help, and nothing secret is in it, in what it came from, or in the log."""
    caplog.set_level(logging.DEBUG, "ckptman")
    given = {**s3_server.options, **wrong}
    storage = ObjectStorage(f"s3://{bucket}/x", storage_options=given, retry=AT_ONCE)
    with pytest.raises(StorageError, match=says) as caught:
        storage.listing("")
    shown = "".join(traceback.format_exception(caught.value)) + repr(storage) + str(vars(caught.value)) + caplog.text
    error: BaseException | None = caught.value
    while error is not None:
        shown += repr(error) + str(error) + repr(error.args)
        error = error.__cause__ or error.__context__
    assert str(given["secret"]) not in shown
    assert f"{ACCESS!r}" not in shown
    manager = CheckpointManager(storage, {"w": torch.ones(1)})
    with pytest.raises(Exception, match=says) as failed:
        manager.save(1, block=True)
    assert str(given["secret"]) not in "".join(traceback.format_exception(failed.value)) + repr(manager)


def test_no_secret_is_written(s3_server: S3Server) -> None:
    """Neither the keys nor the secret of the credentials are in anything that a save leaves in the root."""
    root = s3_server.new_root()
    with CheckpointManager(root, {"w": torch.ones(1)}, storage_options=s3_server.options) as manager:
        url = manager.save(1, block=True).result().url
        shown = repr(manager) + manager.root + url
    storage = s3_server.storage(root)
    shown += "".join(storage.read(stored.key, limit=MIB).decode("latin-1") for stored in storage.listing(""))
    assert "writer.json" in {stored.key for stored in storage.listing("")}
    assert SECRET not in shown
    assert ACCESS not in shown


def test_credentials_may_come_from_the_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without storage_options the driver takes its own variables, and an error does not show those either."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-from-the-environment")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}")
    with pytest.raises(StorageError, match="credentials are wrong") as caught:
        ObjectStorage(s3_server.new_root(), retry=AT_ONCE).listing("")
    assert "canary" not in repr(caught.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert ObjectStorage(s3_server.new_root()).listing("") == []
