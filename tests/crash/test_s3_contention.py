"""Writers that contend for one root on a real S3 server, and sleep beyond their leases: nothing granted is lost."""

from __future__ import annotations

import os
import random
import time
from contextlib import ExitStack, suppress

import msgspec
import pytest
import torch
from accidents import Child, Tell
from s3_server import S3Server

from ckptman import CheckpointManager, CkptmanError
from ckptman.format.catalog import Entry
from ckptman.format.names import Attempt
from ckptman.repository import lease
from ckptman.repository.changes import with_checkpoint
from ckptman.repository.head import read_head
from ckptman.repository.ownership import Ownership, take
from ckptman.storage.base import Buffer, Storage
from ckptman.storage.object import ObjectStorage


class Overwriting(ObjectStorage):
    """A storage with locks only: the last of two puts wins."""

    def create(self, key: str, data: Buffer) -> None:
        time.sleep(random.random() / 10)  # a pause between reading and writing, as networks have
        self._guard("create", key, lambda driver: driver.call("put_object", self._path(key), Body=bytes(data)))


def contend(storage: Storage, template: Entry, tell: Tell, until: float) -> None:
    """Take the root over, add a few checkpoints with pauses longer than the lease, and again; tell what was granted."""
    chance = random.Random(os.getpid())
    while time.time() < until:
        with suppress(CkptmanError):
            owner = take(storage, timeout_s=2)
            try:
                for _ in range(chance.randint(1, 3)):
                    step = chance.getrandbits(40)
                    attempt = Attempt(step=step, epoch=owner.writer.epoch, nonce=f"{chance.getrandbits(32):08x}")
                    entry = msgspec.structs.replace(template, step=step, attempt=str(attempt))
                    owner.commit(lambda entries, entry=entry: with_checkpoint(entries, entry), f"step {step}")
                    tell(str(step))
                    time.sleep(chance.random() * 0.6)
            finally:
                owner.release()
    tell("end")


def history(server: S3Server, kind: type[ObjectStorage], *, writers: int, seconds: float) -> tuple[list[int], set[int]]:
    """The steps that *writers* were told are committed, and those that are listed in the end."""
    first = server.storage()
    with CheckpointManager(first, {"w": torch.ones(1)}, rng=False) as manager:
        manager.save(0, block=True)
        template = manager._claim.owner().newest.checkpoints[0]

    def act(tell: Tell) -> None:
        storage = kind(first.url, filesystem=server.storage()._filesystem, single_writer=True)
        storage.listing("")
        contend(storage, template, tell, time.time() + seconds)

    granted: list[int] = []
    with ExitStack() as stack:
        for child in [stack.enter_context(Child(act)) for _ in range(writers)]:
            while (line := child.hear()) != "end":
                granted.append(int(line))
    record = read_head(first).record
    assert record is not None
    return granted, {entry.step for entry in record.checkpoints}


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LIFE_S", 0.3)
    monkeypatch.setattr(lease, "POLL_S", 0.05)


@pytest.mark.parametrize("seconds", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_nothing_acknowledged_is_lost(s3_server: S3Server, seconds: int) -> None:
    """Eight processes, each one's lease expired time and again: whatever was granted is listed in the end."""
    granted, listed = history(s3_server, ObjectStorage, writers=8, seconds=seconds)
    print(f"{len(granted)} commits granted in {seconds} s")
    assert len(granted) >= 8
    assert set(granted) <= listed


def test_the_checker_finds_what_locks_alone_lose(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without fencing and create-only puts, with the lease alone: some of what was granted is gone."""
    monkeypatch.setattr(Ownership, "_still_ours", lambda owner, head: owner.writer)
    lost: set[int] = set()
    for _ in range(5):  # chance decides how soon
        granted, listed = history(s3_server, Overwriting, writers=4, seconds=3)
        lost = set(granted) - listed
        if lost:
            break
    print(f"{len(lost)} of {len(granted)} lost")
    assert lost
