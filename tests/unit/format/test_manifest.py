"""Manifests: each rule of the format broken once, and nothing accepted that breaks one."""

from __future__ import annotations

import copy
import json
import re
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from time import perf_counter
from typing import Any

import msgspec
import pytest

from ckptman.errors import FormatError
from ckptman.format.digest import sha256
from ckptman.format.manifest import Chunk, Component, Manifest, Tensor, read_manifest, write_manifest
from ckptman.format.safetensors_layout import Wanted, lay_out
from ckptman.format.sealed import Torn

ATTEMPT = "step-000000000007.w0001.0123abcd"
Change = Callable[[Any], None]


def sealed(body: bytes) -> bytes:
    return b'{"sha256":"%s","body":%s}\n' % (sha256(body).encode(), body)


def changed(manifest: Manifest, change: Change) -> bytes:
    """The manifest's JSON after *change*, sealed again with a right digest: what a hostile writer could make."""
    body = json.loads(msgspec.json.encode(manifest))
    change(body)
    return sealed(json.dumps(body).encode())


def put(path: str, value: object) -> Change:
    """Set one place of the JSON, such as ``tensors.0.chunks.0.nbytes``."""

    def change(body: Any) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            body = body[part]
        body[last] = value

    return change


def remove(key: str) -> Change:
    return lambda body: body.pop(key)


def test_it_comes_back_equal(manifest: Manifest) -> None:
    """read(write(x)) == x, microseconds and all; bytes are the same every time."""
    data = write_manifest(manifest)
    assert read_manifest(data, ATTEMPT) == manifest
    assert write_manifest(read_manifest(data, ATTEMPT)) == data
    assert read_manifest(data, ATTEMPT).created_at.microsecond == 678901


def test_the_fixture_has_what_the_rules_below_change(manifest: Manifest) -> None:
    """The changes below aim at these places: an unchanged copy is accepted, and tensor 1 is float32 (2, 3)."""
    assert read_manifest(changed(manifest, lambda body: None), ATTEMPT) == manifest
    assert [tensor.name for tensor in manifest.tensors] == ["model/phase", "model/none", "model/weight", "model/bias"]


HOSTILE_PATHS = [
    "../model.safetensors",
    f"../{ATTEMPT}/model.safetensors",
    f"/{ATTEMPT}/model.safetensors",
    f"{ATTEMPT}/../../etc/passwd.safetensors",
    f"{ATTEMPT}\\model.safetensors",
    f"{ATTEMPT}/a\0.safetensors",
    f"{ATTEMPT}/nul.safetensors",
    f"{ATTEMPT}/a:b.safetensors",
    f"{ATTEMPT}/sub/model.safetensors",
    f"{ATTEMPT}//model.safetensors",
    f"{ATTEMPT}/manifest.json",
    "catalog/model.safetensors",
    "writer.lock",
    "C:/model.safetensors",
    "",
]

RULES: list[tuple[str, Change, str]] = [
    ("unknown field", put("colour", 1), "unknown field `colour`"),
    ("unknown field in a file", put("files.0.colour", 1), "unknown field `colour`"),
    ("unknown field in a chunk", put("tensors.2.chunks.0.colour", 1), "unknown field `colour`"),
    ("unknown field in a component", put("components.model.colour", 1), "unknown field `colour`"),
    ("missing field", remove("files"), "missing required field `files`"),
    ("null", put("tensors", None), "got `null`"),
    ("negative step", put("step", -1), ">= 0"),
    ("huge step", put("step", 2**63), "<= 9223372036854775807"),
    ("absurd step", put("step", 10**400), "<= 9223372036854775807"),
    ("fractional step", put("step", 7.5), "Expected `int`"),
    ("true for a number", put("after", True), "Expected `int`"),
    ("another step", put("step", 8), "says step 8 but lies in an attempt at step 7"),
    ("no attempt", put("attempt", "../x"), "not the name of an attempt"),
    ("no ranks", put("world_size", 0), ">= 1"),
    ("another digest", put("digest", "md5"), "'md5' is not known"),
    ("no block size", put("block_nbytes", 0), ">= 1"),
    ("no time zone", put("created_at", "2026-01-02T03:04:05"), "timezone"),
    ("another time zone", put("created_at", "2026-01-02T03:04:05+01:00"), "not in UTC"),
    ("no time", put("created_at", 5), "datetime"),
    ("metric null", put("metrics.loss", None), "metrics"),
    ("metric word", put("metrics.loss", "many"), "many"),
    ("metric name", put("metrics", {"a\nb": 1.0}), "cannot name a metric"),
    ("metric count", put("metrics", {f"m{i}": 1.0 for i in range(1001)}), "at most 1000 metrics"),
    ("component name", put("components.a/b", {"kind": "x", "values": None}), "cannot name a component"),
    ("component device", put("components.nul", {"kind": "x", "values": None}), "cannot name a component"),
    ("component twice", put("components.MODEL", {"kind": "x", "values": None}), "'model' is listed twice"),
    *((f"path {path!r}", put("files.0.path", path), "") for path in HOSTILE_PATHS),
    ("file smaller than its header", put("files.0.nbytes", 20), "cannot have 20 bytes"),
    ("file of all bytes", put("files.0.nbytes", 2**63 - 1), "cannot have"),
    ("huge header", lambda b: b["files"][0].update(header_nbytes=2**40, nbytes=2**41), "with a header of"),
    ("header digest", put("files.0.header_digest", "0" * 31), "matching regex"),
    ("header digest's newline", put("files.0.header_digest", "0" * 32 + "\n"), "matching regex"),
    ("file twice", lambda b: b["files"].append({**b["files"][0]}), "listed twice"),
    (
        "file twice in capitals",
        lambda b: b["files"].append({**b["files"][0], "path": f"{ATTEMPT}/MODEL.safetensors"}),
        "",
    ),
    ("tensor of no component", put("tensors.2.name", "other/weight"), "belongs to no component"),
    ("tensor without name", put("tensors.2.name", "model/"), "belongs to no component"),
    ("tensor of nothing", put("tensors.2.name", "weight"), "belongs to no component"),
    ("tensor twice", put("tensors.2.name", "model/bias"), "'model/bias' is listed twice"),
    ("unknown dtype", put("tensors.2.dtype", "float33"), "unknown dtype 'float33'"),
    ("dtype of safetensors", put("tensors.2.dtype", "F32"), "unknown dtype 'F32'"),
    ("negative shape", put("tensors.2.shape", [-2, -3]), ">= 0"),
    ("larger shape", put("tensors.2.shape", [3, 3]), "is not its shape's size"),
    ("absurd shape", put("tensors.2.shape", [2**63 - 1] * 60), "is not its shape's size"),
    ("too many dimensions", put("tensors.2.shape", [1] * 65), "65 dimensions"),
    ("no chunks", put("tensors.2.chunks", []), "needs 24 bytes, its chunks have 0"),
    ("chunk twice", lambda b: b["tensors"][2]["chunks"].append(b["tensors"][2]["chunks"][0]), "its chunks have 48"),
    ("chunk's file", put("tensors.2.chunks.0.file", 1), "in a file that is not listed"),
    ("chunk in the header", put("tensors.2.chunks.0.start", 8), "outside of the data"),
    ("chunk beyond the file", put("tensors.2.chunks.0.start", 2**63 - 1), "outside of the data"),
    ("chunk's size", put("tensors.2.chunks.0.nbytes", 25), "is not its shape's size"),
    ("chunk without digest", put("tensors.2.chunks.0.digests", []), "0 digests for 24 bytes"),
    ("digest too many", put("tensors.2.chunks.0.digests", ["0" * 32] * 2), "2 digests for 24 bytes"),
    ("digest in capitals", put("tensors.2.chunks.0.digests", ["A" * 32]), "is not the digest of a block"),
    ("digest's length", put("tensors.2.chunks.0.digests", ["0" * 33]), "is not the digest of a block"),
    ("chunk beyond the tensor", put("tensors.2.chunks.0.offset", [1, 0]), "reaches beyond the tensor"),
    ("chunk's dimensions", put("tensors.2.chunks.0.offset", [0]), "another number of dimensions"),
    ("alias of nothing", put("aliases", {"model/tied": "model/other"}), "must be one"),
    ("alias of itself", put("aliases", {"model/tied": "model/tied"}), "must be one"),
    ("alias loop", put("aliases", {"model/a": "model/b", "model/b": "model/a"}), "must be one"),
    ("alias of an alias", put("aliases", {"model/a": "model/b", "model/b": "model/bias"}), "must be one"),
    ("alias that is a tensor", put("aliases", {"model/bias": "model/weight"}), "must be no tensor"),
    ("alias of no component", put("aliases", {"other/x": "model/weight"}), "belongs to no component"),
]


@pytest.mark.parametrize(("change", "message"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_a_broken_rule_is_a_telling_format_error(manifest: Manifest, change: Change, message: str) -> None:
    """Refused as whole but wrong, naming the file and the rule; judged the same with or without the catalog."""
    with pytest.raises(FormatError) as caught:
        read_manifest(changed(manifest, change), ATTEMPT)
    assert not isinstance(caught.value, Torn)
    assert str(caught.value).startswith(f"{ATTEMPT}/manifest.json breaks the format: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_a_rule_holds_for_a_tensor_like_one_before_too(manifest: Manifest, change: Change, message: str) -> None:
    """What is usual is passed over quickly: of a dtype and shape that came before, and all else as it should be."""

    def change_the_second(body: Any) -> None:
        first = {**copy.deepcopy(body["tensors"][2]), "name": "model/first"}
        change(body)
        if body.get("tensors"):
            body["tensors"].insert(0, first)

    with pytest.raises(FormatError, match=re.escape(message)):
        read_manifest(changed(manifest, change_the_second), ATTEMPT)


def test_the_rules_are_all_there() -> None:
    """So that a table that shrinks fails."""
    assert len(RULES) >= 75


@pytest.mark.parametrize(
    ("boxes", "good"),
    [
        ([(0, 1), (1, 1)], True),
        ([(1, 1), (0, 1)], True),
        ([(0, 1), (0, 1)], False),
        ([(1, 1), (1, 1)], False),
        ([(0, 1)], False),
        ([(0, 1), (1, 1), (2, 0)], True),
        ([(0, 2), (1, 1)], False),
    ],
)
def test_chunks_must_tile_their_tensor(manifest: Manifest, boxes: list[tuple[int, int]], good: bool) -> None:
    """Overlaps and gaps are refused; order does not matter, empty chunks are harmless."""

    def change(body: Any) -> None:
        tensor = body["tensors"][2]
        chunk = tensor["chunks"][0]
        tensor["chunks"] = [
            {
                **chunk,
                "offset": [at, 0],
                "shape": [size, 3],
                "nbytes": size * 12,
                "digests": chunk["digests"][: size > 0],
            }
            for at, size in boxes
        ]

    data = changed(manifest, change)
    if good:
        assert len(read_manifest(data, ATTEMPT).tensors[2].chunks) == len(boxes)
    else:
        with pytest.raises(FormatError, match=r"overlap|its chunks have"):
            read_manifest(data, ATTEMPT)


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"01", b"+1", b"0x10", b".5"])
def test_numbers_that_json_does_not_have_are_refused(manifest: Manifest, literal: bytes) -> None:
    """No NaN literals, no overflow to infinity, no other spelling of numbers."""
    body = msgspec.json.encode(manifest)
    assert body.count(b'"loss":0.5') == 1
    with pytest.raises(FormatError):
        read_manifest(sealed(body.replace(b'"loss":0.5', b'"loss":' + literal)), ATTEMPT)


def test_whole_numbers_are_metrics_too(manifest: Manifest) -> None:
    """A writer in another language may say 1 for 1.0."""
    loss = read_manifest(changed(manifest, put("metrics.loss", 1)), ATTEMPT).metrics["loss"]
    assert (loss, type(loss)) == (1.0, float)


@pytest.mark.parametrize(
    "values",
    [b"[" * 10_000_000, b"[" * 5_000_000 + b"]" * 5_000_000, b'{"a":' * 2_000_000],
    ids=["open", "closed", "objects"],
)
def test_megabytes_of_nesting_are_refused_fast_and_small(manifest: Manifest, values: bytes) -> None:
    """A 10 MB bomb in a component's values: refused within 2 s, in memory of the order of the document itself."""
    body = msgspec.json.encode(manifest).replace(b'"values":3', b'"values":' + values)
    data = sealed(body)
    assert len(data) > 9_000_000
    tracemalloc.start()
    begun = perf_counter()
    with pytest.raises(FormatError):
        read_manifest(data, ATTEMPT)
    took, peak = perf_counter() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 2
    assert peak < 4 * len(data)


def test_it_belongs_to_its_folder(manifest: Manifest) -> None:
    """A manifest that was copied into another attempt's folder is refused."""
    with pytest.raises(FormatError, match="was the folder renamed"):
        read_manifest(write_manifest(manifest), "step-000000000007.w0002.0123abcd")


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": 8},
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": float("inf")}},
        {"created_at": datetime(2026, 1, 1)},  # a naive time is the point
        {"created_at": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1)))},
        {"components": {"a/b": Component(kind="x", values=msgspec.Raw(b"1"))}},
        {"components": {"model": Component(kind="x", values=msgspec.Raw(b"{"))}},
        {"environment": {"program": "\ud800"}},
        {"world_size": 2**70},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_cannot_be_read_is_never_written(manifest: Manifest, change: dict[str, Any]) -> None:
    """The writer holds itself to the reader's rules."""
    with pytest.raises(FormatError):
        write_manifest(msgspec.structs.replace(manifest, **change))


def test_sizes(manifest: Manifest) -> None:
    """nbytes counts every tensor once, new_nbytes only those in this attempt's own files; the others are borrowed."""
    assert manifest.nbytes == manifest.new_nbytes == 16 + 0 + 24 + 6
    assert manifest.borrows == ()
    older = "step-000000000006.w0001.00000000/model.safetensors"
    borrowing = read_manifest(changed(manifest, put("files.0.path", older)), ATTEMPT)
    assert (borrowing.nbytes, borrowing.new_nbytes, borrowing.borrows) == (46, 0, (older,))


def test_fifty_thousand_tensors(manifest: Manifest) -> None:
    """A very large model's manifest comes back equal; time is linear (well under a second on an idle core)."""
    layout = lay_out([Wanted(name=f"layers.{index}.w", dtype="float32", shape=(2, 2)) for index in range(50_000)])
    large = msgspec.structs.replace(
        manifest,
        files=(layout.file(f"{ATTEMPT}/model.safetensors"),),
        tensors=tuple(
            Tensor(
                name=f"model/{placed.name}",
                dtype=placed.dtype,
                shape=placed.shape,
                chunks=(Chunk(file=0, start=placed.start, nbytes=16, digests=("0" * 32,)),),
            )
            for placed in layout.tensors
        ),
        aliases={},
    )
    begun = perf_counter()
    data = write_manifest(large)
    back = read_manifest(data, ATTEMPT)
    took = perf_counter() - begun
    assert back == large
    assert took < 5  # ten times what it takes: a quadratic step would need minutes


def test_times_are_exact(manifest: Manifest) -> None:
    """Every microsecond survives."""
    for microsecond in (0, 1, 999_999, 100_000):
        moment = datetime(2026, 12, 31, 23, 59, 59, microsecond, tzinfo=UTC)
        back = read_manifest(write_manifest(msgspec.structs.replace(manifest, created_at=moment)), ATTEMPT)
        assert back.created_at == moment
