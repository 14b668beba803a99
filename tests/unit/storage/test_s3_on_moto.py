"""S3 as far as an imitation within this process shows it: pages, policies, versions, conditions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from moto_server import Moto, imitate

from ckptman import CheckpointManager, SaveFailed, StorageError, keep
from ckptman.storage import s3_upload
from ckptman.storage.base import KeyChanged, KeyExists, Storage


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with imitate() as moto:
        yield moto


@pytest.fixture
def bucket(moto: Moto) -> str:
    return moto.new_bucket()


def test_every_page_of_a_listing_is_read(moto: Moto, bucket: str) -> None:
    """With pages of three: all keys, in order, all folders, and nothing of a neighbour whose name begins alike."""
    storage = moto.storage(bucket, s3_additional_kwargs={"MaxKeys": 3})
    neighbour = moto.storage(bucket, "runs/ab")
    neighbour.create("f/x", b"")
    keys = [f"f{number % 4}/{number:02}" for number in range(11)]
    for key in keys:
        storage.create(key, b"x")
    assert [stored.key for stored in storage.listing("")] == sorted(keys)
    assert [stored.key for stored in storage.listing("f1")] == ["f1/01", "f1/05", "f1/09"]
    assert storage.folders() == ["f0", "f1", "f2", "f3"]
    assert neighbour.folders() == ["f"]


def test_every_page_of_unfinished_uploads_is_read(moto: Moto, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are old enough are aborted, whatever page they are on; those of another root are left."""
    monkeypatch.setattr("ckptman.storage.s3.STALE", -timedelta(days=1))
    for key in (*(f"runs/a/f/{number}" for number in range(7)), "runs/b/f/other"):
        moto.client.create_multipart_upload(Bucket=bucket, Key=key)
    moto.storage(bucket, s3_additional_kwargs={"MaxUploads": 2}).remove_temporaries("")
    left = moto.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["runs/b/f/other"]


def test_a_commit_that_a_policy_forbids_is_a_failed_save(moto: Moto, bucket: str) -> None:
    """It was refused at once, so nothing is unknown: its files are deleted, and the checkpoint before it stands."""
    state = {"w": torch.ones(3)}
    with CheckpointManager(moto.storage(bucket), state, rng=False) as manager:
        manager.save(1, block=True)
        before = {stored.key for stored in moto.storage(bucket).listing("")}
        moto.deny(bucket, "PutObject", "/runs/a/catalog/*")
        with pytest.raises(SaveFailed, match=r"may not create here: permit it \(s3:PutObject on S3\)") as caught:
            manager.save(2, block=True)
        assert "canary" not in repr(caught.value) + str(caught.value.__cause__)
        assert {stored.key for stored in moto.storage(bucket).listing("")} == before
        moto.client.delete_bucket_policy(Bucket=bucket)
        manager.save(3, block=True)
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 3]


def test_a_save_stands_though_nothing_may_be_deleted(moto: Moto, bucket: str) -> None:
    """What is dropped stays as garbage, and the next writer that may delete sweeps it."""
    state = {"w": torch.ones(3)}
    with CheckpointManager(moto.storage(bucket), state, keep=keep.last(1), rng=False) as manager:
        manager.save(1, block=True)
        moto.deny(bucket, "DeleteObject", "/*")
        manager.save(2, block=True)
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [2]
    assert len(attempts(moto.storage(bucket))) == 2
    moto.client.delete_bucket_policy(Bucket=bucket)
    with CheckpointManager(moto.storage(bucket), state, keep=keep.last(1), rng=False, lock_timeout=0) as manager:
        manager.save(3, block=True)
    assert len(attempts(moto.storage(bucket))) == 1


def attempts(storage: Storage) -> list[str]:
    """Those that hold anything: a server may go on naming a folder that is empty."""
    names = {stored.key.partition("/")[0] for stored in storage.listing("")}
    return [name for name in names if name.startswith("step-")]


def test_a_bucket_that_keeps_versions(moto: Moto, bucket: str) -> None:
    """Deleted is deleted, though the bucket remembers: what was pruned is gone, and its successor restores."""
    moto.client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    state = {"w": torch.zeros(3)}
    with CheckpointManager(moto.storage(bucket), state, keep=keep.last(2), rng=False) as manager:
        for step in range(1, 5):
            state["w"].fill_(step)
            manager.save(step, block=True)
        manager.delete(3)
    with warnings.catch_warnings(), CheckpointManager(moto.storage(bucket), state, rng=False) as manager:
        warnings.simplefilter("error")
        state["w"].zero_()
        assert manager.restore() is not None
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [4]
    assert state["w"].tolist() == [4, 4, 4]
    assert len(attempts(moto.storage(bucket))) == 1


def test_an_upload_in_parts_is_completed_create_only(moto: Moto, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two uploads of one key the second to be completed is refused, and dropped."""
    monkeypatch.setattr(s3_upload, "PART_NBYTES", 5 << 20)
    first, second = moto.storage(bucket), moto.storage(bucket)
    with pytest.raises(KeyExists), second.open_new("f/a") as loser:
        loser.write(b"2" * (6 << 20))
        with first.open_new("f/a") as winner:
            winner.write(b"1" * (6 << 20))
    assert first.read("f/a", limit=6 << 20) == b"1" * (6 << 20)
    assert "Uploads" not in moto.client.list_multipart_uploads(Bucket=bucket)


def test_a_value_is_swapped_by_one_only(moto: Moto, bucket: str) -> None:
    """Of two changes of one version the second is refused; so is a change of what is gone."""
    storage = moto.storage(bucket)
    storage.create("writer.json", b"0")
    value, version = storage.read_version("writer.json", limit=9)
    storage.swap("writer.json", b"1", expected=version)
    with pytest.raises(KeyChanged):
        storage.swap("writer.json", b"2", expected=version)
    assert (value, storage.read("writer.json", limit=9)) == (b"0", b"1")
    storage.delete(["writer.json"])
    with pytest.raises(StorageError):
        storage.swap("writer.json", b"3", expected=version)
