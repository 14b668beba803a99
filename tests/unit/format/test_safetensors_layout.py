"""Layouts, judged by the real safetensors library; and the strict reading of headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from ckptman.errors import FormatError
from ckptman.format.digest import block_digest
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import Chunk, Manifest, Tensor
from ckptman.format.safetensors_layout import (
    Layout,
    Wanted,
    check_header,
    header_key,
    lay_out,
    native,
    read_header,
)

ODD_NAMES = ["__metadata__", "", "a/b", "../x", "é😀", "\0", '"\\', "x" * 1000, "\u2028", " ", "__metadata__~", "dtype"]


def held(manifest: Manifest) -> list[tuple[Tensor, Chunk]]:
    """The chunks of a manifest with one file."""
    return [(tensor, chunk) for tensor in manifest.tensors for chunk in tensor.chunks]


def filled(layout: Layout, seed: int = 0) -> bytes:
    """The whole file, its data random 0s and 1s (valid for every type, bool included)."""
    nbytes = layout.nbytes - len(layout.header)
    return layout.header + np.random.default_rng(seed).integers(0, 2, nbytes, np.uint8).tobytes()


def expected(file: bytes, layout: Layout) -> dict[str, torch.Tensor]:
    """Each tensor by our own account of where it lies."""
    result = {}
    for placed in layout.tensors:
        raw = bytearray(file[placed.start : placed.start + placed.nbytes])
        flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        _, shape = native(placed.dtype, placed.shape)
        kind = getattr(torch, placed.dtype) if DTYPES[placed.dtype].safetensors else torch.uint8
        result[placed.key] = flat.view(kind).reshape(shape) if raw else torch.empty(shape, dtype=kind)
    return result


def assert_library_agrees(layout: Layout, tmp_path: Path) -> None:
    """Read back by load_file, load and safe_open: the same keys, types, shapes and bits."""
    file = filled(layout)
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    ours = expected(file, layout)
    with safetensors.safe_open(str(path), "pt") as opened:
        lazily = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # it is no mapping
        assert opened.metadata() == {"format": "pt"}
    for theirs in (safetensors.torch.load_file(path), safetensors.torch.load(file), lazily):
        assert theirs.keys() == ours.keys()
        for key, tensor in ours.items():
            assert (theirs[key].dtype, theirs[key].shape) == (tensor.dtype, tensor.shape)
            assert theirs[key].contiguous().view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0, 3), (1,) * 20], ids=str)
def test_every_dtype_loads_with_equal_values(shape: tuple[int, ...], tmp_path: Path) -> None:
    """All 41 types in one file; those that safetensors cannot hold come as their bytes."""
    layout = lay_out([Wanted(name=dtype, dtype=dtype, shape=shape) for dtype in DTYPES])
    assert len(layout.tensors) == 41
    assert_library_agrees(layout, tmp_path)


def test_numpy_loads_it_too(tmp_path: Path) -> None:
    """Where NumPy has the type."""
    names = ["bool", "int8", "uint16", "int32", "float16", "float32", "float64", "uint64", "complex64"]
    layout = lay_out([Wanted(name=name, dtype=name, shape=(4,)) for name in names])
    (tmp_path / "x.safetensors").write_bytes(filled(layout))
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == set(names)
    assert {name: loaded[name].dtype.name for name in names} == {
        **dict(zip(names, names, strict=True)),
        "complex64": "uint8",
    }


def test_odd_names(tmp_path: Path) -> None:
    """Any text is a name; only the one that means metadata gets another key, and never one that is taken."""
    layout = lay_out([Wanted(name=name, dtype="int8", shape=(1,)) for name in ODD_NAMES])
    assert_library_agrees(layout, tmp_path)
    keys = {placed.name: placed.key for placed in layout.tensors}
    assert keys == {**{name: name for name in ODD_NAMES}, "__metadata__": "__metadata__~~"}


def test_header_key() -> None:
    """Deterministic, and the name itself wherever that is possible."""
    assert header_key("a") == "a"
    assert header_key("a", {"a", "a~"}) == "a~~"
    assert header_key("__metadata__") == "__metadata__~"


def test_boxes_of_one_tensor_get_different_keys() -> None:
    """A rank may own several boxes of one tensor: the first keeps the name."""
    layout = lay_out([Wanted(name=name, dtype="int8", shape=(1,)) for name in ("w", "w", "w~", "w")])
    assert [placed.key for placed in layout.tensors] == ["w", "w~~", "w~", "w~~~"]


def test_an_empty_state_is_a_valid_file(tmp_path: Path) -> None:
    """No tensors: a header and nothing else."""
    layout = lay_out([])
    assert (layout.nbytes, layout.tensors) == (len(layout.header), ())
    assert_library_agrees(layout, tmp_path)
    assert read_header(layout.header, layout.nbytes) == {}


def test_alignment_and_order() -> None:
    """Data begin at a multiple of 64; every tensor is aligned to its items; no holes; equal sizes keep their order."""
    wanted = [
        Wanted(name=f"{dtype}.{index}", dtype=dtype, shape=(index,)) for index in (1, 3, 0, 7) for dtype in DTYPES
    ]
    layout = lay_out(wanted)
    assert len(layout.header) % 64 == 0
    stop = len(layout.header)
    for placed in layout.tensors:
        assert placed.start == stop
        assert placed.start % DTYPES[placed.dtype].itemsize == 0
        stop += placed.nbytes
    assert stop == layout.nbytes
    order = [placed.name for placed in layout.tensors]
    assert order == [w.name for w in sorted(wanted, key=lambda w: -DTYPES[w.dtype].itemsize)]


def test_it_is_deterministic() -> None:
    """The same tensors give the same bytes: incremental saves and tests rely on it."""
    wanted = [Wanted(name=name, dtype="float32", shape=(2,)) for name in "cab"]
    assert lay_out(wanted) == lay_out(list(wanted))
    assert lay_out(wanted).header == (
        b"\xf8\0\0\0\0\0\0\0"
        b'{"__metadata__":{"format":"pt"},"c":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},"b":{"dtype":"F32","shape":[2],"data_offsets":[16,24]}}'
    ).ljust(256)


def test_unknown_dtypes_are_refused() -> None:
    """Before anything is laid out."""
    with pytest.raises(FormatError, match="'qint8' is not known"):
        lay_out([Wanted(name="a", dtype="qint8", shape=(1,))])


def test_fifty_thousand_tensors() -> None:
    """About 0.2 s on an idle core; the library reads the header."""
    wanted = [
        Wanted(name=f"layers.{index}.weight", dtype=("float32", "int8")[index % 2], shape=(1, 2))
        for index in range(50_000)
    ]
    begun = perf_counter()
    layout = lay_out(wanted)
    took = perf_counter() - begun
    assert took < 2
    assert len(safetensors.torch.load(filled(layout))) == 50_000
    assert len(read_header(layout.header, layout.nbytes)) == 50_000


def test_a_header_that_no_library_reads_is_not_made() -> None:
    """100 MB is the library's limit."""
    with pytest.raises(FormatError, match="too many for one safetensors file"):
        lay_out([Wanted(name=f"{index}" + "x" * 10_000_000, dtype="int8", shape=()) for index in range(10)])


def test_read_header_says_what_was_laid_out(layout: Layout) -> None:
    """Keys, types, shapes and ranges, counted from the start of the file."""
    assert read_header(layout.header, layout.nbytes) == {
        placed.key: (*native(placed.dtype, placed.shape), placed.start, placed.start + placed.nbytes)
        for placed in layout.tensors
    }


def test_read_header_reads_what_the_library_writes() -> None:
    """The rules are stricter than the library's, but not than what it writes."""
    file = safetensors.torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.int8)}, {"x": "y"})
    (length,) = struct.unpack_from("<Q", file)
    spans = read_header(file[: 8 + length], len(file))
    assert {key: span[:2] for key, span in spans.items()} == {"a": ("F32", (3,)), "b": ("I8", (2, 2))}


def with_header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


ONE = b'{"dtype":"I8","shape":[4],"data_offsets":[0,4]}'
TWO = b'{"dtype":"I8","shape":[4],"data_offsets":[4,8]}'

BAD_HEADERS: list[tuple[str, bytes, int]] = [
    ("empty", b"", 0),
    ("short", b"\0" * 7, 7),
    ("longer than the file", with_header(b'{"a":' + ONE + b"}"), 20),
    ("length too large", b"\xff" * 8 + b"{}", 10),
    ("length too small", struct.pack("<Q", 1) + b"{}", 10),
    ("no JSON", with_header(b"{"), 9),
    ("no object", with_header(b"[]"), 10),
    ("no UTF-8", with_header(b'{"\xff":' + ONE + b"}"), 60),
    ("a bomb", with_header(b"[" * 1_000_000), 1_000_008),
    ("key twice", with_header(b'{"a":' + ONE + b',"a":' + ONE + b"}"), 0),
    (
        "key twice, empty",
        with_header(b'{"a":%(e)s,"a":%(e)s}' % {b"e": b'{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'}),
        -4,
    ),
    ("overlap", with_header(b'{"a":' + ONE + b',"b":' + ONE + b"}"), 0),
    ("hole before", with_header(b'{"b":' + TWO + b"}"), 4),
    ("bytes behind", with_header(b'{"a":' + ONE + b"}"), 1),
    ("bytes missing", with_header(b'{"a":' + ONE + b',"b":' + TWO + b"}"), 3),
    ("unknown dtype", with_header(b'{"a":{"dtype":"I7","shape":[4],"data_offsets":[0,4]}}'), 0),
    ("dtype no text", with_header(b'{"a":{"dtype":[],"shape":[4],"data_offsets":[0,4]}}'), 0),
    ("shape negative", with_header(b'{"a":{"dtype":"I8","shape":[-4],"data_offsets":[0,4]}}'), 0),
    ("shape huge", with_header(b'{"a":{"dtype":"I8","shape":[9223372036854775808],"data_offsets":[0,4]}}'), 0),
    ("shape product", with_header(b'{"a":{"dtype":"I8","shape":[4294967296,4294967296],"data_offsets":[0,4]}}'), 0),
    ("shape true", with_header(b'{"a":{"dtype":"I8","shape":[true],"data_offsets":[0,1]}}'), -3),
    ("shape of 65", with_header(b'{"a":{"dtype":"I8","shape":[' + b"1," * 64 + b'1],"data_offsets":[0,1]}}'), -3),
    ("offsets reversed", with_header(b'{"a":{"dtype":"I8","shape":[4],"data_offsets":[4,0]}}'), 0),
    ("offsets three", with_header(b'{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4,4]}}'), 0),
    ("offsets floats", with_header(b'{"a":{"dtype":"I8","shape":[4],"data_offsets":[0.0,4.0]}}'), 0),
    ("field missing", with_header(b'{"a":{"dtype":"I8","shape":[4]}}'), 0),
    ("field unknown", with_header(b'{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4],"x":1}}'), 0),
    ("field twice", with_header(b'{"a":{"dtype":"I8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}'), 0),
    ("NaN", with_header(b'{"__metadata__":NaN,"a":' + ONE + b"}"), 0),
    ("entry no object", with_header(b'{"a":[]}'), 0),
    ("key with lone surrogate", with_header(b'{"\\ud800":' + ONE + b"}"), 0),
]


@pytest.mark.parametrize(("header", "more"), [bad[1:] for bad in BAD_HEADERS], ids=[bad[0] for bad in BAD_HEADERS])
def test_bad_headers_are_format_errors(header: bytes, more: int) -> None:
    """Nothing else is raised; *more* is how the file differs from four bytes of data (or its size, where small)."""
    named = {bad[1]: bad[0] for bad in BAD_HEADERS}[header]
    absolute = named in {"empty", "short", "longer than the file", "length too large", "length too small"}
    with pytest.raises(FormatError):
        read_header(header, more if absolute else len(header) + 4 + more)


def test_the_four_bytes_are_right() -> None:
    """The good twin of the headers above is accepted, so that they fail for their own reason."""
    good = with_header(b'{"a":' + ONE + b"}")
    assert read_header(good, len(good) + 4) == {"a": ("I8", (4,), len(good), len(good) + 4)}


def test_a_header_agrees_with_its_manifest(layout: Layout, manifest: Manifest) -> None:
    """No differences; the file's description holds the header's size and digest."""
    file = manifest.files[0]
    assert check_header(layout.header, file, held(manifest), manifest) == []
    assert (file.header_nbytes, file.nbytes) == (len(layout.header) - 8, layout.nbytes)
    assert file.header_digest == block_digest(layout.header)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.update({"wait": h.pop("weight")}), ["'weight'", "nothing", "'wait' is in the header, but not"]),
        (lambda h: h["weight"].update(shape=[3, 2]), ["'weight'", "(2, 3)", "(3, 2)"]),
        (lambda h: h["weight"].update(dtype="I32"), ["'weight'", "'F32'", "'I32'"]),
        (lambda h: h["none"].update(dtype="U64"), ["'none'", "'I64'", "'U64'"]),
        (lambda h: h.update({"__metadata__": {}, "": {**h["none"], "shape": [0]}}), ["'' is in the header"]),
        (lambda h: h.pop("none"), ["'none'", "nothing"]),
        (lambda h: h.pop("bias"), ["should end at byte"]),
    ],
)
def test_differences_are_named(layout: Layout, manifest: Manifest, change: Change, words: list[str]) -> None:
    """Keys, types, shapes and ranges must be the same on both sides."""
    tree = json.loads(layout.header[8:])
    change(tree)
    header = with_header(json.dumps(tree, separators=(",", ":")).encode().ljust(len(layout.header) - 8))
    differences = " ".join(check_header(header, manifest.files[0], held(manifest), manifest))
    for word in words:
        assert word in differences


def test_a_borrowed_file_may_hold_more(layout: Layout, manifest: Manifest) -> None:
    """Its own attempt needs the rest; but what this manifest claims must be there."""
    file = msgspec.structs.replace(manifest.files[0], path="step-000000000001.w0001.00000000/model.safetensors")
    fewer = msgspec.structs.replace(manifest, files=(file,), tensors=manifest.tensors[:2])
    assert check_header(layout.header, file, held(fewer), fewer) == []
    own = msgspec.structs.replace(fewer, files=manifest.files)
    assert len(check_header(layout.header, own.files[0], held(own), own)) == 2


def test_the_tables_are_all_there() -> None:
    """So that a table that shrinks fails."""
    assert len(BAD_HEADERS) >= 30
