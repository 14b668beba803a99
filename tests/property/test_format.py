"""The format under arbitrary values and arbitrary bytes: round trips, and no error but our own."""

from __future__ import annotations

import json
import struct
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from ckptman.errors import FormatError
from ckptman.format.catalog import read_record
from ckptman.format.digest import sha256
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import read_manifest
from ckptman.format.safetensors_layout import Wanted, lay_out, native, read_header
from ckptman.format.values import ArrayRef, TensorRef, TorchDevice, TorchDtype, TorchSize, from_json, to_json

usual = settings(deadline=None, derandomize=True, max_examples=300)

any_text = st.text(st.characters(codec=None, exclude_categories=()))
numpy_dtypes = (
    stnp.boolean_dtypes()
    | stnp.integer_dtypes()
    | stnp.unsigned_integer_dtypes()
    | stnp.floating_dtypes(sizes=(16, 32, 64))
    | stnp.complex_number_dtypes(sizes=(64, 128))
    | stnp.datetime64_dtypes()
    | stnp.timedelta64_dtypes()
    | stnp.byte_string_dtypes(max_len=5)
    | stnp.unicode_string_dtypes(max_len=5)
)
arrays = stnp.arrays(numpy_dtypes, stnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
numpy_scalars = numpy_dtypes.flatmap(stnp.from_dtype)
atoms = st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.floats() | any_text | st.binary()
keys = st.recursive(atoms | st.complex_numbers(), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
scalars = (
    keys
    | numpy_scalars
    | numpy_dtypes
    | st.lists(st.sampled_from(["a", "..", "b c", "é"]), min_size=1).map(lambda parts: Path(*parts))
    | arrays
    | st.sampled_from(
        [TensorRef("a"), ArrayRef("b\n"), TorchDtype("float32"), TorchDevice("cuda:0"), TorchSize((1, 2))]
    )
)


def containers(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    lists = st.lists(inner, max_size=4)
    dicts = st.dictionaries(keys, inner, max_size=4)
    return (
        lists
        | lists.map(tuple)
        | st.builds(deque, lists, st.sampled_from([None, 4, 2**60]))
        | dicts
        | st.dictionaries(st.text(max_size=4) | st.just("$"), inner, max_size=4)
        | dicts.map(OrderedDict)
        | dicts.map(Counter)  # type: ignore[misc]
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
    )


values = st.recursive(scalars, containers, max_leaves=20)


def picture(value: object) -> object:
    """A value's type, order and bits, all the way down, as something that ``==`` compares exactly."""
    kind = type(value).__name__
    if isinstance(value, np.ndarray):
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (np.str_, np.bytes_)):
        return kind, repr(value), len(value)
    if isinstance(value, np.generic):
        return kind, value.dtype.str, value.tobytes()
    if isinstance(value, float):
        return kind, struct.pack(">d", value)
    if isinstance(value, complex):
        return kind, picture(value.real), picture(value.imag)
    if isinstance(value, dict):
        return kind, [(picture(key), picture(item)) for key, item in value.items()]
    if isinstance(value, deque):
        return kind, value.maxlen, [picture(item) for item in value]
    if isinstance(value, (list, tuple)):
        return kind, [picture(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(repr(picture(item)) for item in value)
    return kind, value


markers = (TensorRef, ArrayRef, TorchDtype, TorchDevice, TorchSize)


def extract(value: object, path: str) -> TensorRef | ArrayRef | TorchDtype | TorchDevice | TorchSize | None:
    return value if isinstance(value, markers) else None


@given(values)
@usual
def test_values_come_back_in_type_order_and_bits(value: object) -> None:
    """from_json(to_json(x)) is x, and is encoded the same way again."""
    data = to_json(value, "x", extract)
    back = from_json(data)
    assert picture(back) == picture(value)
    assert to_json(back, "x", extract) == data


@given(values)
@usual
def test_the_encoding_is_plain_json(value: object) -> None:
    """Any strict JSON parser reads it."""

    def refuse(constant: str) -> object:
        raise AssertionError(constant)

    json.loads(to_json(value, "x", extract).decode("utf-8"), parse_constant=refuse)


tags = st.sampled_from(
    [
        "int",
        "float",
        "str",
        "bytes",
        "tuple",
        "set",
        "frozenset",
        "dict",
        "OrderedDict",
        "Counter",
        "deque",
        "complex",
        "path",
        "numpy",
        "numpy.array",
        "numpy.dtype",
        "tensor",
        "array",
        "torch.dtype",
        "torch.device",
        "torch.Size",
    ]
)
some_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.sampled_from(["<f4", "|O", "AAAA", "0x1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3)
        | st.dictionaries(st.sampled_from(["$", "v", "dtype", "shape", "maxlen", "a"]), inner, max_size=4)
        | st.builds(lambda tag, v: {"$": tag, "v": v}, tags, inner)
        | st.builds(lambda tag, d, s, v: {"$": tag, "dtype": d, "shape": s, "v": v}, tags, inner, inner, inner)
    ),
    max_leaves=15,
)


@given(some_json.map(lambda tree: json.dumps(tree).encode()) | st.binary(max_size=200))
@settings(usual, max_examples=1000)
def test_arbitrary_json_is_read_or_refused(data: bytes) -> None:
    """Only `FormatError`; and what is accepted is a value that can be written and read again."""
    try:
        value = from_json(data)
    except FormatError:
        return
    assert picture(from_json(to_json(value, "x", extract))) == picture(value)


@given(values, st.data())
@usual
def test_damaged_values_are_read_or_refused(value: object, draw: st.DataObject) -> None:
    """One byte changed, removed or doubled anywhere: never an error that is not ours."""
    data = to_json(value, "x", extract)
    at = draw.draw(st.integers(0, len(data) - 1))
    middle = draw.draw(st.binary(max_size=2))
    with suppress(FormatError):
        from_json(data[:at] + middle + data[at + 1 :])


@given(some_json)
@settings(usual, max_examples=300)
def test_sealed_nonsense_is_refused(tree: object) -> None:
    """A right digest over any JSON: manifests and records refuse it with `FormatError` only."""
    body = json.dumps({"format": 1, "body": tree}).encode()
    data = b'{"sha256":"%s","body":%s}\n' % (sha256(body).encode(), body)
    attempt = "step-000000000001.w0001.00000000"
    for read in (lambda: read_manifest(data, attempt), lambda: read_record(data, 1)):
        try:
            read()
        except FormatError:
            continue
        raise AssertionError("nonsense was accepted")


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
wanted = st.builds(
    lambda n, d, s: Wanted(name=n, dtype=d, shape=s), st.text(max_size=6), st.sampled_from(sorted(DTYPES)), shapes
)


@given(st.lists(wanted, max_size=12))
@settings(usual, max_examples=150)
def test_layouts_are_what_safetensors_reads(tensors: list[Wanted]) -> None:
    """Any tensors: the library sees the same keys, types, shapes and bytes; our reader too; all are aligned."""
    layout = lay_out(tensors)
    data = bytes(index % 2 for index in range(layout.nbytes - len(layout.header)))
    file = layout.header + data
    theirs = safetensors.torch.load(file)
    spans = read_header(layout.header, layout.nbytes)
    assert theirs.keys() == spans.keys() == {placed.key for placed in layout.tensors}
    assert sorted(placed.name for placed in layout.tensors) == sorted(tensor.name for tensor in tensors)
    assert len(layout.header) % 64 == 0
    for placed in layout.tensors:
        assert spans[placed.key] == (*native(placed.dtype, placed.shape), placed.start, placed.start + placed.nbytes)
        assert placed.start % DTYPES[placed.dtype].itemsize == 0
        tensor = theirs[placed.key]
        assert tuple(tensor.shape) == native(placed.dtype, placed.shape)[1]
        if placed.nbytes:
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert raw == file[placed.start : placed.start + placed.nbytes]


@given(st.binary(max_size=300), st.integers(0, 400))
@usual
def test_arbitrary_headers_are_read_or_refused(header: bytes, nbytes: int) -> None:
    """Any bytes, with and without a length that fits."""
    for candidate in (header, struct.pack("<Q", len(header)) + header):
        try:
            read_header(candidate, nbytes)
        except FormatError:
            continue
