"""Typed values: what is written, what comes back, what is refused on either side."""

from __future__ import annotations

import enum
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from ckptman.errors import FormatError, UnsupportedState
from ckptman.format.values import (
    ArrayRef,
    Marker,
    TensorRef,
    TorchDevice,
    TorchDtype,
    TorchSize,
    from_json,
    to_json,
)

BIG = 2**53

EXAMPLES: list[tuple[object, str]] = [
    (None, "null"),
    (True, "true"),
    (False, "false"),
    (0, "0"),
    (1, "1"),
    (BIG - 1, "9007199254740991"),
    (1 - BIG, "-9007199254740991"),
    (BIG, '{"$":"int","v":"0x20000000000000"}'),
    (-BIG, '{"$":"int","v":"-0x20000000000000"}'),
    (0.0, "0.0"),
    (-0.0, "-0.0"),
    (1.0, "1.0"),
    (0.1, "0.1"),
    (5e-324, "5e-324"),
    (1e22, "1e22"),
    (math.inf, '{"$":"float","v":"inf"}'),
    (-math.inf, '{"$":"float","v":"-inf"}'),
    ("", '""'),
    ('é\u2028😀"\\\n', '"é\u2028😀\\"\\\\\\n"'),
    ("\ud800", '{"$":"str","v":"7aCA"}'),
    (b"\0\xff", '{"$":"bytes","v":"AP8="}'),
    (b"", '{"$":"bytes","v":""}'),
    ([], "[]"),
    ([1, [2.0, None]], "[1,[2.0,null]]"),
    ((), '{"$":"tuple","v":[]}'),
    ((1, (2,)), '{"$":"tuple","v":[1,{"$":"tuple","v":[2]}]}'),
    ({}, "{}"),
    ({"b": 1, "a": {"": 2}}, '{"b":1,"a":{"":2}}'),
    ({"$": 1}, '{"$":"dict","v":[["$",1]]}'),
    ({"a": 0, "$": 1}, '{"$":"dict","v":[["a",0],["$",1]]}'),
    ({1: "x", "1": "y", None: 0}, '{"$":"dict","v":[[1,"x"],["1","y"],[null,0]]}'),
    ({True: 1}, '{"$":"dict","v":[[true,1]]}'),
    ({1.0: 1}, '{"$":"dict","v":[[1.0,1]]}'),
    ({(0, "a"): [1]}, '{"$":"dict","v":[[{"$":"tuple","v":[0,"a"]},[1]]]}'),
    ({"\udfff": 1}, '{"$":"dict","v":[[{"$":"str","v":"7b+/"},1]]}'),
    (OrderedDict(b=1, a=2), '{"$":"OrderedDict","v":[["b",1],["a",2]]}'),
    (Counter({80: 1, 30: 2}), '{"$":"Counter","v":[[80,1],[30,2]]}'),
    (deque([1, 2], maxlen=3), '{"$":"deque","maxlen":3,"v":[1,2]}'),
    (deque(maxlen=2**60), '{"$":"deque","maxlen":{"$":"int","v":"0x1000000000000000"},"v":[]}'),
    (deque(), '{"$":"deque","maxlen":null,"v":[]}'),
    ({2, 1, "a"}, '{"$":"set","v":["a",1,2]}'),
    (set(), '{"$":"set","v":[]}'),
    (frozenset({None, (1,)}), '{"$":"frozenset","v":[null,{"$":"tuple","v":[1]}]}'),
    (complex(-0.0, math.inf), '{"$":"complex","v":[-0.0,{"$":"float","v":"inf"}]}'),
    (Path("runs/a"), '{"$":"path","v":"runs/a"}'),
    (np.float32(1.5), '{"$":"numpy","dtype":"<f4","v":"AADAPw=="}'),
    (np.float64(1.5), '{"$":"numpy","dtype":"<f8","v":"AAAAAAAA+D8="}'),
    (np.bool_(True), '{"$":"numpy","dtype":"|b1","v":"AQ=="}'),
    (np.str_("a\0"), '{"$":"numpy","dtype":"<U2","v":"YQAAAAAAAAA="}'),
    (np.bytes_(b"a\0"), '{"$":"numpy","dtype":"|S2","v":"YQA="}'),
    (np.str_(""), '{"$":"numpy","dtype":"<U0","v":""}'),
    (np.datetime64(5, "ns"), '{"$":"numpy","dtype":"<M8[ns]","v":"BQAAAAAAAAA="}'),
    (np.dtype("float16"), '{"$":"numpy.dtype","v":"<f2"}'),
]


def alike(a: object, b: object) -> bool:
    """Equal in value, in type, in order and in bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex):
        assert isinstance(b, complex)
        return alike(a.real, b.real) and alike(a.imag, b.imag)
    if isinstance(a, dict):
        assert isinstance(b, dict)
        return len(a) == len(b) and all(alike(x, y) and alike(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, (list, tuple, deque)):
        assert isinstance(b, (list, tuple, deque))
        same = len(a) == len(b) and all(map(alike, a, b))
        return same and (not isinstance(a, deque) or a.maxlen == b.maxlen)  # type: ignore[union-attr]
    return bool(a == b) or a is b or (isinstance(a, np.generic) and a.tobytes() == b.tobytes())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "text"), EXAMPLES, ids=[text[:50].encode("unicode_escape").decode() for _, text in EXAMPLES]
)
def test_the_encoding_is_exactly_this_and_comes_back(value: object, text: str) -> None:
    """The normative bytes of every type, and the same value, type and order again."""
    assert to_json(value, "x").decode() == text
    assert alike(from_json(text.encode()), value)
    assert alike(from_json(memoryview(text.encode())), value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.arange(6, dtype=">f4").reshape(2, 3).T,
        np.zeros((0, 3), np.float16),
        np.array(2.5),
        np.array(["a", "bcd"]),
        np.array([b"a", b"bcd"]),
        np.array(["2026-01-01", "NaT"], "M8[ms]"),
        np.array([1 + 2j], np.complex64),
        np.zeros(4096, np.uint8),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_small_arrays_come_back_writable(array: np.ndarray) -> None:
    """Bit for bit, in their byte order; owning their memory."""
    back = from_json(to_json(array, "x"))
    assert alike(back, np.ascontiguousarray(array).reshape(array.shape))
    assert isinstance(back, np.ndarray)
    assert back.flags.writeable


@pytest.mark.parametrize("bits", [0x7FF8000000000000, 0xFFF8000000000000, 0x7FF0000000000001, 0x7FF8DEADBEEF0001])
def test_nans_keep_their_bits(bits: int) -> None:
    """Sign, quiet bit and payload; alone, in a complex number, and in NumPy's types."""
    (nan,) = struct.unpack(">d", struct.pack(">Q", bits))
    for value in (nan, complex(1.0, nan), complex(nan, -0.0), [nan], {nan: nan}):
        assert alike(from_json(to_json(value, "x")), value)
    assert f'"nan:{bits:016x}"'.encode() in to_json(nan, "x")


def test_integers_have_no_limit() -> None:
    """Python's limit of 4,300 decimal digits does not bite, neither as a value nor as a key in a path."""
    huge = -(3**40_000)
    assert from_json(to_json(huge, "x")) == huge
    assert from_json(to_json({huge: {(huge,): 1}}, "x")) == {huge: {(huge,): 1}}
    with pytest.raises(UnsupportedState, match="0x"):
        to_json({huge: object()}, "x")


def test_sets_are_written_in_one_order() -> None:
    """Whatever the hash seed says."""
    values = [f"k{index}" for index in range(100)]
    assert json.loads(to_json(set(values), "x"))["v"] == sorted(values)


class Colour(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")  # the untyped kind is what training code has


class MyStr(str):
    __slots__ = ()


class MyFloat(np.float64):
    __slots__ = ()


REFUSED: list[object] = [
    *(
        object(),
        defaultdict(int),
        Point(1, 2),
        Colour.RED,
        MyStr("x"),
        bytearray(b"x"),
        range(3),
        slice(1),
        (1).__add__,
    ),
    *(Decimal(1), Fraction(1, 2), datetime(2026, 1, 1, tzinfo=UTC), UUID(int=1), int, np.float32, ..., iter([])),
    *(np.longdouble(1), np.array([None]), np.zeros(4097, np.uint8), np.zeros(2, "i4,f4"), np.void(b"x")),
    *(
        np.zeros(1).view(np.recarray),
        MyFloat(1),
        np.ma.array([1]),
        np.dtype("O"),
        np.dtype("i4,f4"),
        lambda: 0,
        memoryview(b"x"),
    ),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_outside_of_the_closed_set(value: object) -> None:
    """Refused with its path, its type and a hint; a subclass is never taken for its parent."""
    with pytest.raises(UnsupportedState) as caught:
        to_json({"sampler": [0, (value,)]}, "loader")
    assert caught.value.path == "loader['sampler'][1][0]"
    message = str(caught.value)
    assert message.startswith("cannot save loader['sampler'][1][0]: ")
    assert type(value).__qualname__ in message
    assert "state_dict and load_state_dict" in message


def test_paths_read_like_python() -> None:
    """Keys as written in Python, list positions, sets without one."""
    cases: list[tuple[object, str]] = [
        ([{"a": {3: object()}}], "x[0]['a'][3]"),
        ({(1, "b"): {2.5: deque([object()])}}, "x[(1, 'b')][2.5][0]"),
        ({frozenset({range(1)})}, "x{…}{…}"),
        ({"it's": OrderedDict(a=object())}, "x[\"it's\"]['a']"),
    ]
    for value, path in cases:
        with pytest.raises(UnsupportedState) as caught:
            to_json(value, "x")
        assert caught.value.path == path


@pytest.mark.parametrize(
    "key", [frozenset(), Path("a"), (1, frozenset()), Colour.RED, np.dtype("f4"), MyStr("a"), MyFloat(1)]
)
def test_keys_must_be_scalars(key: object) -> None:
    """The message speaks of the key, at the path of the dict."""
    with pytest.raises(UnsupportedState, match="keys may be scalars") as caught:
        to_json([{key: 1}], "x")
    assert caught.value.path == "x[0]"


def test_numpy_scalars_are_keys_too() -> None:
    """A key keeps its type."""
    ((key, _),) = from_json(to_json({np.int64(3): 1}, "x")).items()  # type: ignore[attr-defined]
    assert type(key) is np.int64


def nested(depth: int, kind: str) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"list": [value], "dict": {1: value}, "tuple": (value,), "json": {"a": value}}[kind]
    return value


@pytest.mark.parametrize("kind", ["list", "dict", "tuple", "json"])
def test_depth_has_a_limit_on_both_sides(kind: str) -> None:
    """200 containers are fine, 201 are an error of ours, whatever they are; also when a file claims them."""
    data = to_json(nested(200, kind), "x")
    assert alike(from_json(data), nested(200, kind))
    with pytest.raises(UnsupportedState, match="nested more than 200 deep, or contains itself"):
        to_json(nested(201, kind), "x")
    deeper = {
        "list": b"[%s]",
        "dict": b'{"$":"dict","v":[[1,%s]]}',
        "tuple": b'{"$":"tuple","v":[%s]}',
        "json": b'{"":%s}',
    }
    with pytest.raises(FormatError, match="deep"):
        from_json(deeper[kind] % data)


def test_a_value_that_contains_itself() -> None:
    """Cycles end in the depth limit; the message says what they may be."""
    cycle: list[object] = []
    cycle.append({"again": cycle})
    with pytest.raises(UnsupportedState, match="or contains itself"):
        to_json(cycle, "x")


MARKERS: list[tuple[Marker, str]] = [
    (TensorRef("a/b"), '{"$":"tensor","v":"a/b"}'),
    (ArrayRef("c"), '{"$":"array","v":"c"}'),
    (TorchDtype("float32"), '{"$":"torch.dtype","v":"float32"}'),
    (TorchDevice("cuda:0"), '{"$":"torch.device","v":"cuda:0"}'),
    (TorchSize((2, 2**60)), '{"$":"torch.Size","v":[2,{"$":"int","v":"0x1000000000000000"}]}'),
    (TorchSize(()), '{"$":"torch.Size","v":[]}'),
]


@pytest.mark.parametrize(("marker", "text"), MARKERS, ids=[text for _, text in MARKERS])
def test_extract_and_resolve(marker: Marker, text: str) -> None:
    """Foreign objects are offered with their path, and their markers are handed to resolve."""
    foreign = object()
    asked: list[tuple[object, str]] = []

    def extract(value: object, path: str) -> Marker | None:
        asked.append((value, path))
        return marker if value is foreign else None

    data = to_json({"a": [foreign, 1, "x", np.int8(1)]}, "opt", extract)
    assert data.decode() == f'{{"a":[{text},1,"x",{{"$":"numpy","dtype":"|i1","v":"AQ=="}}]}}'
    assert asked == [(foreign, "opt['a'][0]"), (np.int8(1), "opt['a'][3]")]
    assert from_json(data) == {"a": [marker, 1, "x", np.int8(1)]}
    assert from_json(data, lambda found: foreign if found == marker else None) == {"a": [foreign, 1, "x", np.int8(1)]}


def test_errors_of_resolve_are_passed_on() -> None:
    """They are the caller's own: not turned into a FormatError."""

    def resolve(marker: Marker) -> object:
        raise KeyError(marker)

    with pytest.raises(KeyError):
        from_json(b'{"$":"tensor","v":"a"}', resolve)


BAD_JSON: list[bytes] = [
    *(b"", b" ", b"nul", b"[", b"[1,]", b"{1:2}", b"[1] 2", b"NaN", b"-Infinity", b"1e999", b"-1e999", b"01", b"'a'"),
    *(b'"\xff"', b'"\xed\xa0\x80"', b'"\\ud800"', b'{"\\ud800":1}', b'"\n"', b"\xef\xbb\xbf1", "1".encode("utf-16")),
    *(b"9007199254740992", b"-9007199254740992", b"9" * 5000, b'{"a":1,"a":1}', b'{"a":1,"$":"tuple"}'),
    *(
        b'{"$":1}',
        b'{"$":null,"v":1}',
        b'{"$":["tuple"],"v":[]}',
        b'{"$":"nope","v":1}',
        b'{"$":"builtins.eval","v":"1"}',
    ),
    *(
        b'{"$":"tuple"}',
        b'{"$":"tuple","v":[],"w":1}',
        b'{"$":"tuple","v":[],"v":[]}',
        b'{"$":"tuple","$":"tuple","v":[]}',
    ),
    *(b'{"$":"tuple","v":{}}', b'{"$":"tuple","v":"ab"}', b'{"$":"tuple","v":null}', b'{"v":[],"$":"tuple"}'),
    *(
        b'{"$":"int","v":1}',
        b'{"$":"int","v":"0x1"}',
        b'{"$":"int","v":"0x020000000000000"}',
        b'{"$":"int","v":"0X20000000000000"}',
    ),
    *(
        b'{"$":"int","v":"0x2000000000000G"}',
        b'{"$":"int","v":"0x20000000000000\\n"}',
        b'{"$":"int","v":"20000000000000"}',
    ),
    *(
        b'{"$":"int","v":"+0x20000000000000"}',
        b'{"$":"int","v":"0x2_0000000000000"}',
        b'{"$":"int","v":"0xAAAAAAAAAAAAAAAAA"}',
    ),
    *(
        b'{"$":"float","v":"nan"}',
        b'{"$":"float","v":"1.0"}',
        b'{"$":"float","v":"nan:7ff0000000000000"}',
        b'{"$":"float","v":1.0}',
    ),
    *(
        b'{"$":"float","v":"nan:3ff0000000000000"}',
        b'{"$":"float","v":"nan:7FF8000000000000"}',
        b'{"$":"float","v":[]}',
    ),
    *(b'{"$":"str","v":"YQ=="}', b'{"$":"str","v":"/w=="}', b'{"$":"str","v":1}', b'{"$":"bytes","v":"AP8"}'),
    *(
        b'{"$":"bytes","v":"AP9="}',
        b'{"$":"bytes","v":"A P8="}',
        b'{"$":"bytes","v":"AP8=\\n"}',
        '{"$":"bytes","v":"é"}'.encode(),
    ),
    *(b'{"$":"bytes","v":null}', b'{"$":"complex","v":[1,2]}', b'{"$":"complex","v":[1.0]}', b'{"$":"complex","v":{}}'),
    *(b'{"$":"complex","v":[1.0,{"$":"complex","v":[1.0,1.0]}]}', b'{"$":"complex","v":[[],[]]}'),
    *(b'{"$":"dict","v":{}}', b'{"$":"dict","v":[1]}', b'{"$":"dict","v":[[1]]}', b'{"$":"dict","v":[[1,2,3]]}'),
    *(b'{"$":"dict","v":[[1,2],[1,2]]}', b'{"$":"dict","v":[[1,2],[true,2]]}', b'{"$":"dict","v":[[1,2],[1.0,2]]}'),
    *(b'{"$":"dict","v":[[[],1]]}', b'{"$":"dict","v":[[{},1]]}', b'{"$":"dict","v":[[{"$":"tuple","v":[[]]},1]]}'),
    *(b'{"$":"dict","v":["ab"]}', b'{"$":"OrderedDict","v":[["a",1],["a",2]]}', b'{"$":"Counter","v":["aa"]}'),
    *(b'{"$":"set","v":[1,1]}', b'{"$":"set","v":[1,true]}', b'{"$":"set","v":[[]]}', b'{"$":"frozenset","v":[{}]}'),
    *(b'{"$":"deque","v":[]}', b'{"$":"deque","maxlen":1,"v":[1,2]}', b'{"$":"deque","maxlen":-1,"v":[]}'),
    *(
        b'{"$":"deque","maxlen":true,"v":[]}',
        b'{"$":"deque","maxlen":1.0,"v":[]}',
        b'{"$":"deque","maxlen":' + b"9" * 30 + b',"v":[]}',
    ),
    *(
        b'{"$":"path","v":1}',
        b'{"$":"path","v":["a"]}',
        b'{"$":"tensor","v":1}',
        b'{"$":"tensor","v":{"$":"tensor","v":"a"}}',
    ),
    *(
        b'{"$":"torch.Size","v":[true]}',
        b'{"$":"torch.Size","v":[1.0]}',
        b'{"$":"torch.Size","v":1}',
        b'{"$":"torch.Size","v":[null]}',
    ),
    *(
        b'{"$":"numpy","v":"AA=="}',
        b'{"$":"numpy","dtype":"|O","v":""}',
        b'{"$":"numpy","dtype":"O","v":"AAAAAAAAAAA="}',
    ),
    *(
        b'{"$":"numpy","dtype":"object","v":"AAAAAAAAAAA="}',
        b'{"$":"numpy","dtype":"<f4","v":"AAA="}',
        b'{"$":"numpy","dtype":4,"v":""}',
    ),
    *(
        b'{"$":"numpy","dtype":"float32","v":"AAAAAA=="}',
        b'{"$":"numpy","dtype":"f4","v":"AAAAAA=="}',
        b'{"$":"numpy","dtype":"=f4","v":"AAAAAA=="}',
    ),
    *(b'{"$":"numpy","dtype":"<M8[foo]","v":"AAAAAAAAAAA="}', b'{"$":"numpy","dtype":"<M8[1s]","v":"AAAAAAAAAAA="}'),
    *(
        b'{"$":"numpy","dtype":"<f4,<f4","v":"AAAAAAAAAAA="}',
        b'{"$":"numpy","dtype":"|V4","v":"AAAAAA=="}',
        b'{"$":"numpy","dtype":"<f16","v":""}',
    ),
    *(
        b'{"$":"numpy","dtype":"<U1","v":"////fw=="}',
        b'{"$":"numpy","dtype":"<U999999999","v":""}',
        b'{"$":"numpy","dtype":"<f4\\n","v":""}',
    ),
    b'{"$":"numpy.array","dtype":"<f4","v":""}',
    b'{"$":"numpy.array","dtype":"<f4","shape":[-1],"v":""}',
    b'{"$":"numpy.array","dtype":"<f4","shape":[true],"v":"AAAAAA=="}',
    b'{"$":"numpy.array","dtype":"<f4","shape":1,"v":"AAAAAA=="}',
    b'{"$":"numpy.array","dtype":"<f4","shape":[2],"v":"AAAAAA=="}',
    b'{"$":"numpy.array","dtype":"<f4","shape":[9007199254740991,9007199254740991],"v":"AAAAAA=="}',
    b'{"$":"numpy.array","dtype":"<f4","shape":[0,9007199254740991,9007199254740991],"v":""}',
    b'{"$":"numpy.array","dtype":"<U0","shape":[9007199254740991],"v":""}',
    b'{"$":"numpy.array","dtype":"|u1","shape":[4097],"v":"' + b"AAAA" * 1365 + b'AAA="}',
    b'{"$":"numpy.array","dtype":"<f4","shape":' + b"[" + b"1," * 99 + b'1],"v":"AAAAAA=="}',
    *(b'{"$":"numpy.dtype","v":"object"}', b'{"$":"numpy.dtype","v":"|O"}', b'{"$":"numpy.dtype","v":null}'),
    *(b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"$":"complex","v":[' * 50_000, b'{"a":' * 100_000),
]


@pytest.mark.parametrize("data", BAD_JSON, ids=[repr(data[:60]) for data in BAD_JSON])
def test_what_is_not_the_format_is_a_format_error(data: bytes) -> None:
    """Never another exception, never a guess."""
    with pytest.raises(FormatError):
        from_json(data)


def test_the_refusals_are_all_there() -> None:
    """So that a table that shrinks fails."""
    assert len(BAD_JSON) >= 125
    assert len(EXAMPLES) >= 50
    assert len(REFUSED) >= 28


def test_other_spellings_of_json_are_read() -> None:
    """Another program may write white space and escapes, surrogate pairs included."""
    assert from_json(b' { "a" : [ 1 , "\\ud83d\\ude00\\u00e9" ] }\n') == {"a": [1, "😀é"]}


def test_fifty_thousand_entries_take_no_time() -> None:
    """An optimizer's state of 50,000 small entries: about 0.05 s on an idle core."""
    value = {f"p{index}": {"step": index, "betas": (0.9, 0.999), "lr": 0.1} for index in range(10_000)}
    begun = perf_counter()
    data = to_json(value, "optimizer")
    written = perf_counter() - begun
    assert from_json(data) == value
    assert written < 1
