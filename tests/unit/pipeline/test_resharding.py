"""Reading parts of tensors: any stored chunks into any box, every byte right, and no block that is not needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckptman.errors import IntegrityError
from ckptman.format.digest import digests
from ckptman.format.manifest import Chunk, Manifest, Tensor
from ckptman.format.safetensors_layout import Wanted, lay_out
from ckptman.pipeline.reading import fill
from ckptman.storage.memory import MemoryStorage

ATTEMPT = "step-000000000001.w0001.0a1b2c3d"
BLOCK = 64


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """As if this process were *rank*: DTensors know their box, and communicate with nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def store(storage: MemoryStorage, values: torch.Tensor, edges: list[list[int]]) -> Manifest:
    """Store *values* as one chunk per cell of the grid of *edges*, with blocks of 64 bytes."""
    cells = list(product(*(list(pairwise(axis)) for axis in edges)))
    parts = [values[tuple(slice(*span) for span in cell)].contiguous() for cell in cells]
    layout = lay_out([Wanted(name=f"w~{i}", dtype="int32", shape=tuple(part.shape)) for i, part in enumerate(parts)])
    data = bytearray(layout.header)
    chunks = []
    for placed, cell, part in zip(layout.tensors, cells, parts, strict=True):
        raw = part.numpy().tobytes()
        assert placed.start == len(data)
        data += raw
        chunks.append(
            Chunk(
                file=0,
                start=placed.start,
                nbytes=len(raw),
                digests=digests(raw, BLOCK),
                offset=tuple(start for start, _ in cell),
                shape=tuple(part.shape),
                key=placed.key,
            )
        )
    path = f"{ATTEMPT}/m.safetensors"
    with storage.open_new(path) as out:
        out.write(bytes(data))
    return Manifest(
        root="r",
        step=1,
        attempt=ATTEMPT,
        after=0,
        created_at=datetime.now(UTC),
        world_size=4,
        metrics={},
        preempted=False,
        block_nbytes=BLOCK,
        components={},
        files=(layout.file(path),),
        tensors=(Tensor(name="m/w", dtype="int32", shape=tuple(values.shape), chunks=tuple(chunks)),),
        aliases={},
        environment={},
    )


def target(shape: tuple[int, ...], mesh: Any, placements: list[Any], *, turned: bool) -> DTensor:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    extent, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    local = torch.full(tuple(extent), -1, dtype=torch.int32)
    if turned and local.dim() > 1:
        local = torch.full(tuple(reversed(extent)), -1, dtype=torch.int32).permute(*reversed(range(local.dim())))
    stride = torch.empty(shape).stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def expected(values: torch.Tensor, whole: DTensor) -> torch.Tensor:
    chunk = whole.__create_chunk_list__()[0]
    return values[tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_chunks_fill_any_box(data: st.DataObject) -> None:
    """Rows, columns, both, replicas, empty boxes, turned memory; chunks of a block, of several, of a part of one."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    values = torch.from_numpy(np.arange(math.prod(shape), dtype=np.int32).reshape(shape) + 1)
    edges = [sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    storage = MemoryStorage()
    manifest = store(storage, values, edges)
    rank, turned = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    axes = st.sampled_from([Replicate(), *(Shard(axis) for axis in range(len(shape)))])
    with fake_rank(rank, 4):
        mesh = init_device_mesh("cpu", (2, 2))
        whole = target(shape, mesh, [data.draw(axes), data.draw(axes)], turned=turned)
        fill(storage, manifest, {"m/w": whole}, threads=2)
        assert torch.equal(whole.to_local(), expected(values, whole))


class Counting(MemoryStorage):
    """Counts what is read."""

    nbytes = 0

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        self.nbytes += len(into)
        return super().read_into(key, start, into)


@pytest.mark.parametrize(("rank", "axis"), [(0, 0), (3, 0), (1, 1)])
def test_only_blocks_with_wanted_bytes_are_read(rank: int, axis: int) -> None:
    """Rows of a matrix: their blocks and no more. Columns: in each row the blocks that have something of them."""
    values = torch.arange(64 * 100, dtype=torch.int32).reshape(64, 100)
    storage = Counting()
    manifest = store(storage, values, [[0, 32, 64], [0, 100]])
    with fake_rank(rank, 4):
        whole = target((64, 100), init_device_mesh("cpu", (4,)), [Shard(axis)], turned=False)
        fill(storage, manifest, {"m/w": whole})
        assert torch.equal(whole.to_local(), expected(values, whole))
    header = manifest.files[0].header_nbytes + 8
    if axis == 0:
        assert 16 * 400 <= storage.nbytes - header <= 16 * 400 + 2 * BLOCK
    else:
        assert 64 * 100 <= storage.nbytes - header <= 64 * (100 + 2 * BLOCK)


def test_damage_outside_of_what_is_needed_is_not_seen_and_inside_it_is() -> None:
    values = torch.arange(64 * 100, dtype=torch.int32).reshape(64, 100)
    storage = MemoryStorage()
    manifest = store(storage, values, [[0, 64], [0, 100]])
    chunk = manifest.tensors[0].chunks[0]
    path = manifest.files[0].path
    data = bytearray(storage.read(path, limit=1 << 30))
    data[chunk.start + 40 * 400] ^= 1  # in row 40
    storage.delete([path])
    with storage.open_new(path) as out:
        out.write(bytes(data))
    for rank, is_damaged in ((0, False), (2, True)):
        with fake_rank(rank, 4):
            whole = target((64, 100), init_device_mesh("cpu", (4,)), [Shard(0)], turned=False)
            if is_damaged:
                with pytest.raises(IntegrityError, match="m/w"):
                    fill(storage, manifest, {"m/w": whole})
            else:
                fill(storage, manifest, {"m/w": whole})
