"""Small pickles that would take for ever, or all memory: they are refused at once."""

from __future__ import annotations

import pickle
import time

import pytest

from ckptman.convert.torch_pickles import TABLE
from ckptman.convert.unpickling import read_pickle
from ckptman.errors import FormatError

LEVELS = 60
SHARED = b")\x94" + b"".join(b"h%c\x86\x94" % level for level in range(LEVELS))
"""A tuple of the same tuple twice, and so on: 60 levels, 2**60 leaves. It is on the stack."""

DEEP = b")" + b"\x85" * 1_000_000


def named(name: bytes) -> bytes:
    module, _, attribute = name.rpartition(b".")
    return b"c" + module + b"\n" + attribute + b"\n"


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(b"}" + SHARED + b"K\x01s.", id="a key of a dict"),
        pytest.param(b"}" + DEEP + b"K\x01s.", id="a deep key of a dict"),
        pytest.param(b"\x8f(" + SHARED + b"\x90.", id="an item of a set"),
        pytest.param(named(b"builtins.set") + b"(" + SHARED + b"t\x85R.", id="an item of a set that is made"),
        pytest.param(named(b"collections.OrderedDict") + b"(" + SHARED + b"K\x01\x86t\x85R.", id="an ordered key"),
        pytest.param(named(b"numpy.dtype") + SHARED + b"\x85R.", id="what an error would show"),
        pytest.param(SHARED + b"\x8c\x01x\x93.", id="the name of a global"),
        pytest.param(
            b"\x8c\x06latin1\x94X\x40\x42\x0f\x00" + b"a" * 1_000_000 + b"\x94"
            b"(" + (named(b"_codecs.encode") + b"h\x01h\x00\x86R") * 10_000 + b"l.",
            id="a text that is encoded 10,000 times",
        ),
    ],
)
def test_it_is_refused_at_once(bomb: bytes) -> None:
    began = time.monotonic()
    with pytest.raises(FormatError):
        read_pickle(b"\x80\x04" + bomb, TABLE, lambda _: None, "x")
    assert time.monotonic() - began < 20


def test_what_python_writes_of_plain_data_is_let_pass() -> None:
    """Shared values, keys that are tuples, sets and large bytes."""
    shared = tuple(range(100))
    value = {"many": [shared] * 10_000, **{(n, (n, "x")): {n, (n, n)} for n in range(10_000)}, "bytes": bytes(1 << 20)}
    for protocol in range(2, 6):
        assert read_pickle(pickle.dumps(value, protocol), TABLE, lambda _: None, "x") == value
