"""
Reading typed values: a border that trusts nothing. What is not exactly the format is a `FormatError`.

The table of tags below is all there is: no class, function or dtype is looked up by a name from a file, and sizes are
compared before memory is taken.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, cast

import numpy as np

from ckptman.errors import FormatError
from ckptman.format.markers import ArrayRef, Marker, TensorRef, TorchDevice, TorchDtype, TorchSize
from ckptman.format.numpy_values import from_base64, read_array, read_dtype, read_scalar

MAX_DEPTH = 200
"""Containers within containers, at most."""

MAX_PLAIN_INT = 2**53 - 1
"""Whole numbers up to this are JSON numbers: every JSON parser, in any language, keeps them exact."""


Resolve = Callable[[Marker], object]


def _identity(marker: Marker) -> object:
    return marker


def from_json(data: bytes | memoryview, resolve: Resolve = _identity) -> object:
    """
    The value that `to_json` encoded as *data*.

    Args:
        data: Typed JSON; need not be trusted.
        resolve: Called with every marker; what it returns takes the marker's place. Its exceptions are passed on.

    Raises:
        FormatError: *data* is not typed JSON, or nested more than 200 deep. No other error comes from *data*.
    """
    try:
        # tuples for objects: unlike dicts they keep duplicate keys, and JSON has no tuples of its own
        tree = json.loads(str(data, "utf-8"), object_pairs_hook=tuple, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not typed JSON: {error}") from error
    try:
        return _Reading(resolve).value(tree, 1)
    except RecursionError as error:
        raise FormatError("typed JSON is nested too deep for this call stack") from error


def is_plain_text(text: str) -> bool:
    """Whether *text* is valid Unicode: has no lone surrogates, and so an encoding in UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_key(key: object) -> bool:
    """Whether *key* may be a key of a dict: a scalar, or a tuple of such."""
    if type(key) is tuple:
        return all(map(is_key, key))
    return type(key) in _KEYS or (isinstance(key, np.generic) and type(key) is key.dtype.type)


_KEYS = frozenset({type(None), bool, int, float, complex, str, bytes})
_HEX = re.compile(r"-?0x[1-9a-f][0-9a-f]*")
_NAN = re.compile(r"nan:[0-9a-f]{16}")


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _wrong(what: str, node: object) -> FormatError:
    return FormatError(f"in typed JSON, {node!r:.80} is not {what}")


class _Reading:
    """One walk over a tree of JSON: turns it into the value that it stands for."""

    __slots__ = ("resolve",)

    def __init__(self, resolve: Resolve) -> None:
        self.resolve = resolve

    def value(self, node: object, depth: int) -> object:
        """The value of *node*, which is itself the *depth*-th container if it is one."""
        kind = type(node)
        if kind is tuple:
            return self._object(node, depth)  # type: ignore[arg-type]  # objects come as tuples of pairs
        if kind is list:
            return self.items(node, _deeper(depth))
        return _scalar(node)

    def items(self, node: object, depth: int) -> list[object]:
        if type(node) is not list:
            raise _wrong("a list", node)
        return [self.value(item, depth) for item in node]

    def pairs(self, node: object, depth: int) -> dict[object, object]:
        if type(node) is not list:
            raise _wrong("a list of pairs", node)
        result: dict[object, object] = {}
        for pair in node:
            if type(pair) is not list or len(pair) != 2:
                raise _wrong("a pair of key and value", pair)
            key = self.value(pair[0], depth)
            if not is_key(key):
                raise _wrong("a key", pair[0])
            if key in result:
                raise _wrong("a key that the dict has only once", pair[0])
            result[key] = self.value(pair[1], depth)
        return result

    def elements(self, node: object, depth: int) -> list[object]:
        elements = self.items(node, depth)
        try:
            distinct = len(set(elements))
        except TypeError as error:
            raise _wrong("a list of what a set can hold", node) from error
        if distinct != len(elements):
            raise _wrong("a list of different elements", node)
        return elements

    def _object(self, node: tuple[tuple[str, object], ...], depth: int) -> object:
        if node and node[0][0] == "$":
            return self._tag(node, depth)
        depth = _deeper(depth)
        result = {_plain(key): self.value(item, depth) for key, item in node}
        if len(result) != len(node) or "$" in result:
            raise _wrong("an object with different keys, '$' only as the first", tuple(key for key, _ in node))
        return result

    def _tag(self, node: tuple[tuple[str, object], ...], depth: int) -> object:
        (_, name), *rest = node
        fields = dict(rest)
        if type(name) is str and len(fields) == len(rest):
            if (scalar := _SCALARS.get(name)) is not None and fields.keys() == {"v"}:
                return scalar(fields["v"])
            if (container := _CONTAINERS.get(name)) is not None and fields.keys() == {"v"}:
                return container(self, fields["v"], _deeper(depth))
            if (marker := _MARKERS.get(name)) is not None and fields.keys() == {"v"}:
                return self.resolve(marker(fields["v"]))
            if name == "deque" and fields.keys() == {"maxlen", "v"}:
                return self._deque(fields["maxlen"], fields["v"], _deeper(depth))
            if name == "numpy" and fields.keys() == {"dtype", "v"}:
                return read_scalar(**fields)
            if name == "numpy.array" and fields.keys() == {"dtype", "shape", "v"}:
                return read_array(**fields)
        raise _wrong("a tag of this format", node)

    def _deque(self, maxlen: object, v: object, depth: int) -> deque[object]:
        items = self.items(v, depth)
        if maxlen is not None and (type(maxlen) is not int or not len(items) <= maxlen <= sys.maxsize):
            raise _wrong("the maxlen of a deque", maxlen)
        return deque(items, maxlen)


def _deeper(depth: int) -> int:
    if depth > MAX_DEPTH:
        raise FormatError(f"typed JSON is nested more than {MAX_DEPTH} deep")
    return depth + 1


def _scalar(node: object) -> object:
    if type(node) is str:
        return _plain(node)
    if type(node) is int and not -MAX_PLAIN_INT <= node <= MAX_PLAIN_INT:
        raise _wrong("a plain whole number", hex(node))
    if type(node) is float and not math.isfinite(node):
        raise FormatError("in typed JSON, a number is beyond the range of a double")
    return node


def _plain(text: str) -> str:
    if not is_plain_text(text):
        raise _wrong("valid Unicode", text)
    return text


def _int(v: object) -> int:
    if type(v) is str and _HEX.fullmatch(v) and abs(value := int(v, 16)) > MAX_PLAIN_INT:
        return value
    raise _wrong("an integer beyond 2**53 - 1 in canonical hexadecimal", v)


def _float(v: object) -> float:
    if type(v) is str and v in ("inf", "-inf"):
        return float(v)
    if type(v) is str and _NAN.fullmatch(v):
        value: float = struct.unpack(">d", bytes.fromhex(v[4:]))[0]
        if math.isnan(value):
            return value
    raise _wrong("'inf', '-inf' or the bits of a NaN", v)


def _str(v: object) -> str:
    try:
        text = from_base64(v).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise _wrong("text in UTF-8", v) from error
    if is_plain_text(text):
        raise _wrong("text that needs a tag", v)
    return text


def _leaf(node: object) -> object:
    """Text or a number within a tag. Takes no other tag, and so never recurses."""
    if type(node) is tuple and len(node) == 2:
        (dollar, name), (v, content) = node
        if dollar == "$" and v == "v" and type(name) is str and name in _LEAVES:
            return _LEAVES[name](content)
    return _scalar(node)


def _complex(v: object) -> complex:
    if type(v) is list and len(v) == 2:
        real, imag = map(_leaf, v)
        if type(real) is float and type(imag) is float:
            return complex(real, imag)
    raise _wrong("a pair of floats", v)


def _name(v: object) -> str:
    name = _leaf(v)
    if type(name) is not str:
        raise _wrong("a name", v)
    return name


def _path(v: object) -> Path:
    return Path(_name(v))


def _size(v: object) -> TorchSize:
    sizes = tuple(map(_leaf, v)) if type(v) is list else (None,)
    if not all(type(size) is int for size in sizes):
        raise _wrong("a torch.Size", v)
    return TorchSize(cast("tuple[int, ...]", sizes))


def _counter(reading: _Reading, v: object, depth: int) -> Counter[object]:
    counter: Counter[object] = Counter()
    for key, count in reading.pairs(v, depth).items():
        counter[key] = cast("int", count)  # a Counter may hold anything
    return counter


_LEAVES: dict[str, Callable[[object], object]] = {"int": _int, "float": _float, "str": _str}

_SCALARS: dict[str, Callable[[object], object]] = {
    **_LEAVES,
    "bytes": from_base64,
    "complex": _complex,
    "path": _path,
    "numpy.dtype": read_dtype,
}

_CONTAINERS: dict[str, Callable[[_Reading, object, int], object]] = {
    "tuple": lambda reading, v, depth: tuple(reading.items(v, depth)),
    "set": lambda reading, v, depth: set(reading.elements(v, depth)),
    "frozenset": lambda reading, v, depth: frozenset(reading.elements(v, depth)),
    "dict": lambda reading, v, depth: reading.pairs(v, depth),
    "OrderedDict": lambda reading, v, depth: OrderedDict(reading.pairs(v, depth)),
    "Counter": _counter,
}

_MARKERS: dict[str, Callable[[object], Marker]] = {
    "tensor": lambda v: TensorRef(_name(v)),
    "array": lambda v: ArrayRef(_name(v)),
    "torch.dtype": lambda v: TorchDtype(_name(v)),
    "torch.device": lambda v: TorchDevice(_name(v)),
    "torch.Size": _size,
}
