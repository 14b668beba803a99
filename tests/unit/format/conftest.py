"""A small, real manifest and record, whole down to their bytes."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest

from ckptman.format.catalog import Record, Writer, entry_of, write_record
from ckptman.format.digest import digests, sha256
from ckptman.format.manifest import Chunk, Component, Manifest, Tensor, write_manifest
from ckptman.format.safetensors_layout import Layout, Wanted, lay_out

ATTEMPT = "step-000000000007.w0001.0123abcd"
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture(scope="session")
def layout() -> Layout:
    return lay_out(
        [
            Wanted(name="weight", dtype="float32", shape=(2, 3)),
            Wanted(name="bias", dtype="bfloat16", shape=(3,)),
            Wanted(name="phase", dtype="complex64", shape=(2,)),
            Wanted(name="none", dtype="int64", shape=(0, 4)),
        ]
    )


@pytest.fixture(scope="session")
def data(layout: Layout) -> bytes:
    return bytes(byte % 251 for byte in range(layout.nbytes - len(layout.header)))


@pytest.fixture(scope="session")
def manifest(layout: Layout, data: bytes) -> Manifest:
    whole = layout.header + data
    return Manifest(
        root="4f1d",
        step=7,
        attempt=ATTEMPT,
        after=3,
        created_at=NOW,
        world_size=1,
        metrics={"loss": 0.5, "odd": "nan"},
        preempted=False,
        components={
            "model": Component(kind="module", values=msgspec.Raw(b"null")),
            "epoch": Component(kind="value", values=msgspec.Raw(b"3")),
        },
        files=(layout.file(f"{ATTEMPT}/model.safetensors"),),
        tensors=tuple(
            Tensor(
                name=f"model/{placed.name}",
                dtype=placed.dtype,
                shape=placed.shape,
                chunks=(
                    Chunk(
                        file=0,
                        start=placed.start,
                        nbytes=placed.nbytes,
                        digests=digests(whole[placed.start : placed.start + placed.nbytes]),
                    ),
                ),
            )
            for placed in layout.tensors
        ),
        aliases={"model/tied": "model/weight"},
        environment={"python": "3.11"},
    )


@pytest.fixture(scope="session")
def record(manifest: Manifest) -> Record:
    entry = entry_of(manifest, sha256(write_manifest(manifest)), tags=("good",))
    writer = Writer(epoch=1, id="77aa", host="here", pid=42, since=NOW)
    return Record(
        root="4f1d",
        number=4,
        committed_at=NOW,
        writer=writer,
        change="save step 7",
        nonce="9",
        previous="0" * 64,
        checkpoints=(entry,),
    )


@pytest.fixture(scope="session")
def record_bytes(record: Record) -> bytes:
    return write_record(record)
