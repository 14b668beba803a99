"""
The closed table of tags: what a tag of typed values may be called, what it may hold, and what it stands for.

Everything here refuses with a `FormatError`. No class, function or dtype is looked up by a name from a file.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Set
from pathlib import Path
from typing import cast

import numpy as np

from ckptman.errors import FormatError
from ckptman.format.markers import ArrayRef, Marker, TensorRef, TorchDevice, TorchDtype, TorchSize
from ckptman.format.numpy_values import read_array, read_dtype, read_scalar
from ckptman.format.strict_json import from_base64, is_plain_text

MAX_PLAIN_INT = 2**53 - 1
"""Whole numbers up to this are JSON numbers: every JSON parser, in any language, keeps them exact."""


def is_key(key: object) -> bool:
    """Whether *key* may be a key of a dict: a scalar, or a tuple of such."""
    if type(key) is tuple:
        return all(map(is_key, key))
    return type(key) in _KEYS or (isinstance(key, np.generic) and type(key) is key.dtype.type)


_KEYS = frozenset({type(None), bool, int, float, complex, str, bytes})

_HEX = re.compile(r"-?0x[1-9a-f][0-9a-f]*")
_NAN = re.compile(r"nan:[0-9a-f]{16}")


def wrong(what: str, node: object) -> FormatError:
    """The error for a *node* that is not *what* should stand there."""
    return FormatError(f"in typed JSON, {node!r:.80} is not {what}")


def plain_scalar(node: object) -> object:
    """The value of a JSON scalar. Raises FormatError for numbers that must be tags, and for invalid Unicode."""
    if type(node) is str:
        return plain_text(node)
    if type(node) is int and not -MAX_PLAIN_INT <= node <= MAX_PLAIN_INT:
        raise wrong("a plain whole number", hex(node))
    if type(node) is float and not math.isfinite(node):
        raise FormatError("in typed JSON, a number is beyond the range of a double")
    return node


def plain_text(text: str) -> str:
    """Return *text* if it is valid Unicode. Raises FormatError."""
    if not is_plain_text(text):
        raise wrong("valid Unicode", text)
    return text


def _int(v: object) -> int:
    if type(v) is str and _HEX.fullmatch(v) and abs(value := int(v, 16)) > MAX_PLAIN_INT:
        return value
    raise wrong("an integer beyond 2**53 - 1 in canonical hexadecimal", v)


def _float(v: object) -> float:
    if type(v) is str and v in ("inf", "-inf"):
        return float(v)
    if type(v) is str and _NAN.fullmatch(v):
        value: float = struct.unpack(">d", bytes.fromhex(v[4:]))[0]
        if math.isnan(value):
            return value
    raise wrong("'inf', '-inf' or the bits of a NaN", v)


def _str(v: object) -> str:
    try:
        text = from_base64(v).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise wrong("text in UTF-8", v) from error
    if is_plain_text(text):
        raise wrong("text that needs a tag", v)
    return text


def _leaf(node: object) -> object:
    """Text or a number within a tag. Takes no other tag, and so never recurses."""
    if type(node) is tuple and len(node) == 2:
        (dollar, name), (v, content) = node
        if dollar == "$" and v == "v" and type(name) is str and name in _LEAVES:
            return _LEAVES[name](content)
    return plain_scalar(node)


def _complex(v: object) -> complex:
    if type(v) is list and len(v) == 2:
        real, imag = map(_leaf, v)
        if type(real) is float and type(imag) is float:
            return complex(real, imag)
    raise wrong("a pair of floats", v)


def _name(v: object) -> str:
    name = _leaf(v)
    if type(name) is not str:
        raise wrong("a name", v)
    return name


def _size(v: object) -> TorchSize:
    sizes = tuple(map(_leaf, v)) if type(v) is list else (None,)
    if not all(type(size) is int for size in sizes):
        raise wrong("a torch.Size", v)
    return TorchSize(cast("tuple[int, ...]", sizes))


def _deque(items: list[object], maxlen: object) -> deque[object]:
    length = _leaf(maxlen)
    if length is None or (type(length) is int and len(items) <= length <= sys.maxsize):
        return deque(items, length)
    raise wrong("the maxlen of a deque", maxlen)


def _distinct(items: list[object]) -> frozenset[object]:
    try:
        elements = frozenset(items)
    except TypeError as error:
        raise FormatError(f"in typed JSON, a set holds what no set can hold: {error}") from error
    if len(elements) != len(items):
        raise FormatError("in typed JSON, a set holds an element twice")
    return elements


def _counter(counts: dict[object, object]) -> Counter[object]:
    counter: Counter[object] = Counter()
    for key, count in counts.items():
        counter[key] = cast("int", count)  # a Counter may hold anything
    return counter


_LEAVES: dict[str, Callable[[object], object]] = {"int": _int, "float": _float, "str": _str}

SCALARS: dict[str, Callable[..., object]] = {
    **_LEAVES,
    "bytes": from_base64,
    "complex": _complex,
    "path": lambda v: Path(_name(v)),
    "numpy": read_scalar,
    "numpy.array": read_array,
    "numpy.dtype": read_dtype,
}

SEQUENCES: dict[str, Callable[..., object]] = {
    "tuple": tuple,
    "set": lambda items: set(_distinct(items)),
    "frozenset": _distinct,
    "deque": _deque,
}

MAPPINGS: dict[str, Callable[[dict[object, object]], object]] = {
    "dict": lambda pairs: pairs,
    "OrderedDict": OrderedDict,
    "Counter": _counter,
}

MARKERS: dict[str, Callable[[object], Marker]] = {
    "tensor": lambda v: TensorRef(_name(v)),
    "array": lambda v: ArrayRef(_name(v)),
    "torch.dtype": lambda v: TorchDtype(_name(v)),
    "torch.device": lambda v: TorchDevice(_name(v)),
    "torch.Size": _size,
}

FIELDS: dict[str, Set[str]] = {
    **dict.fromkeys((*SCALARS, *SEQUENCES, *MAPPINGS, *MARKERS), frozenset({"v"})),
    "deque": frozenset({"maxlen", "v"}),
    "numpy": frozenset({"dtype", "v"}),
    "numpy.array": frozenset({"dtype", "shape", "v"}),
}
"""The fields of every tag besides "$". What is not here does not exist."""
