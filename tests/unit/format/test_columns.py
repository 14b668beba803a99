"""Tensors in many pieces: columns say what a list would have said, and no rule of the format is left out."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise, product
from time import process_time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptman.errors import FormatError
from ckptman.format.digest import sha256
from ckptman.format.manifest import (
    Chunk,
    Component,
    File,
    Manifest,
    ManyChunks,
    Tensor,
    box_of,
    read_manifest,
    write_manifest,
)
from ckptman.pipeline.reports import joined, report_of
from ckptman.plan.load import needs

ATTEMPT = "step-000000000007.w0001.0123abcd"
BLOCK = 8 << 20


def path_of(rank: int) -> str:
    return f"{ATTEMPT}/model{f'.rank-{rank:05d}' if rank else ''}.safetensors"


def manifest_of(tensors: list[Tensor], files: list[File]) -> Manifest:
    return Manifest(
        root="4f1d",
        step=7,
        attempt=ATTEMPT,
        after=3,
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        world_size=len(files),
        metrics={},
        preempted=False,
        components={"model": Component(kind="module", values=msgspec.Raw(b"null"))},
        files=tuple(files),
        tensors=tuple(tensors),
        aliases={},
        environment={},
    )


def stored(shapes: list[tuple[tuple[int, int], tuple[int, int]]], *, block: int = BLOCK) -> Manifest:
    """A manifest of matrices, each given by its shape and the grid that it is cut into; one file for each cell."""
    ends = [8 + 64] * max((m * n for _, (m, n) in shapes), default=1)
    tensors = []
    for number, ((rows, columns), (m, n)) in enumerate(shapes):
        edges = [[size * i // pieces for i in range(pieces + 1)] for size, pieces in ((rows, m), (columns, n))]
        chunks = []
        for rank, (down, across) in enumerate(product(*(pairwise(axis) for axis in edges))):
            shape = down[1] - down[0], across[1] - across[0]
            nbytes = 4 * shape[0] * shape[1]
            if nbytes:
                digests = tuple(os.urandom(16).hex() for _ in range(-(-nbytes // block)))
                place = {"file": rank, "start": ends[rank], "offset": (down[0], across[0]), "shape": shape}
                chunks.append(Chunk(nbytes=nbytes, digests=digests, **place))
                ends[rank] += nbytes
        tensors.append(Tensor(name=f"model/{number}", dtype="float32", shape=(rows, columns), chunks=tuple(chunks)))
    tensors.sort(key=lambda tensor: len(tensor.chunks) > 1)  # the order in which they come back
    files = [
        File(path=path_of(rank), nbytes=end, header_nbytes=64, header_digest="0" * 32) for rank, end in enumerate(ends)
    ]
    return msgspec.structs.replace(manifest_of(tensors, files), block_nbytes=block)


matrices = st.tuples(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(st.integers(1, 4), st.integers(1, 3)))


@settings(deadline=None)
@given(st.lists(matrices, min_size=1, max_size=6), st.sampled_from([8, 16, BLOCK]))
def test_what_was_written_comes_back(shapes: list[tuple[tuple[int, int], tuple[int, int]]], block: int) -> None:
    """Every chunk with its place, box and digests, for any grids, with several blocks to a chunk; the bytes too."""
    manifest = stored(shapes, block=block)
    data = write_manifest(manifest)
    again = read_manifest(data, ATTEMPT)
    assert again == manifest
    assert write_manifest(again) == data
    assert again.new_nbytes == manifest.new_nbytes == manifest.nbytes
    assert [tensor.files for tensor in again.tensors] == [tensor.files for tensor in manifest.tensors]


@settings(deadline=None)
@given(st.lists(matrices, min_size=1, max_size=6))
def test_reports_of_all_ranks_are_one_checkpoint(shapes: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    """Each rank reports what is in its file; rank 0 has what one process would have said."""
    manifest = stored(shapes)
    reports = []
    for rank, file in enumerate(manifest.files):
        own = [
            msgspec.structs.replace(tensor, chunks=(msgspec.structs.replace(chunk, file=0),))
            for tensor in manifest.tensors
            for chunk in tensor.chunks
            if chunk.file == rank
        ]
        reports.append(report_of([file], own, {}))
    files, tensors = joined(reports)
    assert files == list(manifest.files)
    by_name = {tensor.name: tensor for tensor in tensors}
    assert by_name == {tensor.name: tensor for tensor in manifest.tensors}
    again = read_manifest(write_manifest(manifest_of(tensors, files)), ATTEMPT)
    assert {tensor.name: tensor for tensor in again.tensors} == by_name


@settings(deadline=None)
@given(matrices, st.data())
def test_what_a_box_needs_is_found(matrix: tuple[tuple[int, int], tuple[int, int]], data: st.DataObject) -> None:
    """As many chunks, and the same, as if all were looked at; and one that begins at a place is found by it."""
    manifest = stored([matrix])
    (tensor,) = read_manifest(write_manifest(manifest), ATTEMPT).tensors
    start = tuple(data.draw(st.integers(0, size - 1)) for size in tensor.shape)
    extent = tuple(data.draw(st.integers(1, size - first)) for first, size in zip(start, tensor.shape, strict=True))
    assert needs(tensor, [(start, extent)]) == needs(manifest.tensors[0], [(start, extent)])
    if isinstance(tensor.chunks, ManyChunks):
        for chunk in manifest.tensors[0].chunks:
            assert tensor.chunks.at(box_of(chunk, tensor)[0]) == chunk
        assert tensor.chunks.at((99, 99)) is None


def test_what_repeats_is_written_once() -> None:
    """40 tensors of one shape on 4 ranks: one cut, one layout, and no more for a chunk than its digest and little."""
    body = json.loads(write_manifest(stored([((8, 4), (4, 1))] * 40)))["body"]
    assert body["tensors"] == []
    section = body["sharded"]
    assert (len(section["cuts"]), len(section["layouts"]), len(section["files"])) == (1, 1, 4)
    assert all(len(base64.b64decode(one["digests"])) == 40 * 16 for one in section["files"])


Change = Callable[[Any], object]


def put(path: str, value: object) -> Change:
    def change(section: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            section = section[part]
        section[last] = value

    return change


RULES: list[tuple[str, Change, str]] = [
    ("unknown field", put("colour", 1), "unknown field `colour`"),
    ("name", put("tensors.0.name", "loader/x"), "belongs to no component"),
    ("name twice", put("tensors.1.name", "model/0"), "listed twice"),
    ("dtype", put("tensors.0.dtype", "float31"), "unknown dtype"),
    ("dimensions", put("tensors.0.shape", [1] * 65), "65 dimensions"),
    ("another shape", put("tensors.0.shape", [8, 5]), "overlap, or leave"),
    ("another number of dimensions", put("tensors.0.shape", [8]), "another number of dimensions"),
    ("a smaller shape", put("tensors.0.shape", [7, 4]), "reaches beyond"),
    ("huge shape", put("tensors.0.shape", [2**62, 2**62]), "too large"),
    ("no such cut", put("tensors.0.cut", 1), "its cut has another number"),
    ("one box fewer", lambda s: (s["cuts"][0]["offsets"].pop(), s["cuts"][0]["shapes"].pop()), "another number"),
    ("an offset fewer", lambda s: s["cuts"][0]["offsets"].pop(), "3 offsets and 4 shapes"),
    ("overlapping boxes", put("cuts.0.offsets.1", [0, 0]), "overlap, or leave"),
    ("an empty box", put("cuts.0.shapes.1", [0, 4]), "is empty"),
    ("a huge box", put("cuts.0.offsets.1", [2**63 - 1, 0]), "reaches beyond"),
    ("no such tensor", put("layouts.0.tensors.0", 2), "a tensor that is not listed"),
    ("another tensor", put("layouts.0.tensors.0", 1), "its cut has another number"),
    ("a start fewer", lambda s: s["layouts"][0]["starts"].pop(), "2 tensors and 1 places"),
    ("an empty layout", lambda s: s["layouts"].__setitem__(0, {"tensors": [], "starts": []}), "0 tensors"),
    ("one place for two", put("layouts.0.starts.1", 72), "order of the bytes"),
    ("in the header", put("layouts.0.starts.0", 71), "outside of the data"),
    ("beyond the end", put("layouts.0.starts.1", 105), "outside of the data"),
    ("far beyond the end", put("layouts.0.starts.1", 2**63 - 1), "outside of the data"),
    ("no such file", put("files.3.file", 4), "is not listed"),
    ("a file twice", put("files.1.file", 0), "do not ascend"),
    ("no such layout", put("files.1.layout", 1), "a layout that is not listed"),
    ("too few digests", put("files.1.digests", base64.b64encode(bytes(16)).decode()), "16 bytes of digests"),
    ("too many digests", put("files.1.digests", base64.b64encode(bytes(48)).decode()), "too many digests"),
    ("half a digest", put("files.1.digests", base64.b64encode(bytes(40)).decode()), "40 bytes of digests"),
    ("no base64", put("files.1.digests", "?"), "not base64"),
    ("one file fewer", lambda s: s["files"].pop(), "its cut has another number"),
]


@pytest.mark.parametrize(("change", "message"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_each_rule_is_kept(change: Change, message: str) -> None:
    """A section that breaks one rule is refused, and the message says which."""
    whole = stored([((8, 4), (4, 1))] * 2)
    body = json.loads(write_manifest(whole))["body"]

    def sealed() -> bytes:
        text = json.dumps(body).encode()
        return b'{"sha256":"%s","body":%s}\n' % (sha256(text).encode(), text)

    assert read_manifest(sealed(), ATTEMPT) == whole
    change(body["sharded"])
    with pytest.raises(FormatError, match=message):
        read_manifest(sealed(), ATTEMPT)


def test_a_small_document_takes_no_memory() -> None:
    """A layout of many chunks that a file claims to have, without a digest: refused before it is laid out."""
    whole = stored([((8, 4), (4, 1))] * 2)
    body = json.loads(write_manifest(whole))["body"]
    section = body["sharded"]
    section["layouts"][0] = {"tensors": [0] * 100_000, "starts": list(range(72, 100_072))}
    section["files"] = [{"file": 0, "layout": 0, "digests": ""}]
    text = json.dumps(body).encode()
    with pytest.raises(FormatError, match="0 bytes of digests for 100000 chunks"):
        read_manifest(b'{"sha256":"%s","body":%s}\n' % (sha256(text).encode(), text), ATTEMPT)


def test_time_and_size_grow_with_the_number_of_chunks() -> None:
    """500 tensors on 32 and 128 ranks: four times the chunks cost about four times as much; a digest is 22 bytes."""
    costs = []
    for ranks in (32, 128):
        manifest = stored([((1024, 4), (ranks, 1))] * 500)
        begun = process_time()
        data = write_manifest(read_manifest(write_manifest(manifest), ATTEMPT))
        costs.append((process_time() - begun, len(data) / (500 * ranks)))
    (few_s, few_nbytes), (many_s, many_nbytes) = costs
    assert many_s < 12 * few_s
    assert max(few_nbytes, many_nbytes) < 30
