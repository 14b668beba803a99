"""Copying, the mirror and the doctor on a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3_server as server_module
import torch
from s3_server import S3Server

from ckptman import CheckpointManager, Mirror, keep
from ckptman.doctor import costs, exclusion
from ckptman.doctor.examining import examine
from ckptman.pipeline.copying import begin
from ckptman.repository.counterparts import missing
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.base import NewFile, Storage
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import Killed


@pytest.fixture
def source(tmp_path: Path) -> Storage:
    """Two checkpoints that share a frozen file, which takes several parts of an upload."""
    frozen, x = torch.rand(5 << 20), torch.zeros(100)
    with CheckpointManager(tmp_path / "source", {"frozen": {"f": frozen}, "x": x}, rng=False) as manager:
        for step in (1, 2):
            x.fill_(step)
            manager.save(step, metrics={"loss": 1 / step}, tags=[f"t{step}"], block=True)
    return LocalStorage(tmp_path / "source")


def entries(storage: Storage):  # type: ignore[no-untyped-def]
    return Repository(storage).entries()


def copy_all(source: Storage, target: Storage) -> list[int]:
    copying = begin(source, target, timeout_s=60)
    try:
        sent = [copying.copy(entry, entries(source)).sent_nbytes for entry in entries(source)]
        copying.tidy()
    finally:
        copying.release()
    return sent


def assert_intact(storage: Storage) -> None:
    assert [verify(Repository(storage), entry) for entry in entries(storage)] == [[], []]


def test_there_and_back_again(source: Storage, s3_server: S3Server, tmp_path: Path) -> None:
    """Every byte, the metrics and the tags; what is lent is sent once; a second time nothing is."""
    remote, back = s3_server.storage(), LocalStorage(tmp_path / "back")
    first, second = copy_all(source, remote)
    assert first > 5 << 22 > second
    assert copy_all(source, remote) == [0, 0]
    assert_intact(remote)
    copy_all(remote, back)
    assert_intact(back)
    for storage in (remote, back):
        assert missing(entries(source), entries(storage)) == []
        assert [(e.metrics, e.tags) for e in entries(storage)] == [(e.metrics, e.tags) for e in entries(source)]


def test_a_copying_that_was_cut_short_goes_on(
    source: Storage, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose upload was completed is not sent again, though nothing came after it."""
    root = s3_server.new_root()
    dying = s3_server.storage(root)
    open_new = dying.open_new

    def die(key: str) -> NewFile:
        if key.endswith("/x.safetensors"):
            raise Killed
        return open_new(key)

    monkeypatch.setattr(dying, "open_new", die)
    copying = begin(source, dying, timeout_s=60)
    with pytest.raises(Killed):
        copying.copy(entries(source)[0], entries(source))
    copying.release()
    remote = s3_server.storage(root)
    assert entries(remote) == ()
    assert sum(copy_all(source, remote)) < 1 << 20
    assert_intact(remote)


def test_a_mirror(s3_server: S3Server, tmp_path: Path) -> None:
    """Checkpoints arrive, its own rule holds, and a run whose disk is gone goes on from there."""
    root, remote = tmp_path / "root", s3_server.new_root()
    x = torch.zeros(1000)
    mirror = Mirror(remote, keep=keep.last(2), storage_options=s3_server.options)
    with CheckpointManager(root, {"x": x}, mirror=mirror) as manager:
        for step in (1, 2, 3):
            x.fill_(step)
            manager.save(step, block=True)
    assert "canary" not in repr(mirror)
    arrived = entries(s3_server.storage(remote))
    assert arrived[-1].step == 3
    assert len(arrived) <= 2
    with CheckpointManager(tmp_path / "new", {"x": x.zero_()}, mirror=mirror) as manager:
        found = manager.restore()
    assert found is not None
    assert (found.step, x.eq(3).all()) == (3, True)
    assert found.url.startswith(remote)


def test_the_doctor(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is well; what an object store cannot tell is marked; no key stays; no secret is told."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": server_module.ACCESS,
        "AWS_SECRET_ACCESS_KEY": server_module.SECRET,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_server.port}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(costs, "LARGE_NBYTES", 16 << 20)
    monkeypatch.setattr(exclusion, "RACERS", 2)
    monkeypatch.setattr(exclusion, "ROUNDS", 10)
    monkeypatch.setattr(exclusion, "LISTINGS", 3)
    root = s3_server.new_root()
    storage = s3_server.storage(root)
    found = {one.name: one for one in examine(storage, root)}
    assert {name: one.verdict for name, one in found.items() if one.verdict != "ok"} == {"free space": "unknown"}
    assert found["create-only race"].figures["keys"] == 10
    assert "two changes of one value" in found["locks"].what
    assert storage.listing("") == []
    assert "canary" not in str(found)
