"""
Reading typed values: a border that trusts nothing. What is not exactly the format is a `FormatError`.

The table in `ckptman.format.value_tags` is all there is: no class, function or dtype is looked up by a name from a
file, and sizes are compared before memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

from ckptman.errors import FormatError
from ckptman.format.markers import Marker, TensorRef
from ckptman.format.strict_json import parse
from ckptman.format.value_tags import (
    FIELDS,
    MAPPINGS,
    MARKERS,
    SCALARS,
    SEQUENCES,
    is_key,
    plain_scalar,
    plain_text,
    wrong,
)

MAX_DEPTH = 200
"""Containers within containers, at most."""

_TENSOR = ("$", "tensor")

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
    tree = parse(data)  # objects are tuples of pairs from here on
    try:
        return _Reading(resolve).value(tree, 1)
    except RecursionError as error:
        raise FormatError("typed JSON is nested too deep for this call stack") from error


class _Reading:
    """
    One walk over a tree of JSON: turns it into the value that it stands for.

    Two Python frames per level and no more, so that 200 levels fit into Python's own recursion limit.
    """

    __slots__ = ("_resolve",)

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve

    def value(self, node: object, depth: int) -> object:
        """The value of *node*, which is itself the *depth*-th container if it is one."""
        if type(node) is list:
            return self._items(node, depth)
        if type(node) is not tuple:
            return plain_scalar(node)
        if not node or node[0][0] != "$":
            return self._object(node, depth)
        if len(node) == 2 and node[0] == _TENSOR and node[1][0] == "v":  # the short way for what there is most of
            text = node[1][1]
            if type(text) is str and text.isascii():
                return self._resolve(TensorRef(text))
        name, v, rest = _tag(node)
        if (scalar := SCALARS.get(name)) is not None:
            return scalar(v, **rest)
        if (sequence := SEQUENCES.get(name)) is not None:
            return sequence(self._items(v, depth), **rest)
        if (mapping := MAPPINGS.get(name)) is not None:
            return mapping(self._pairs(v, depth))
        return self._resolve(MARKERS[name](v))

    def _items(self, node: object, depth: int) -> list[object]:
        _check_depth(depth)
        if type(node) is not list:
            raise wrong("a list", node)
        if {int}.issuperset(map(type, node)):  # 625 numbers of Python's generator, read by every rank
            return list(map(plain_scalar, node))
        return list(map(self.value, node, repeat(depth + 1)))

    def _pairs(self, node: object, depth: int) -> dict[object, object]:
        _check_depth(depth)
        if type(node) is not list:
            raise wrong("a list of pairs", node)
        result: dict[object, object] = {}
        for pair in node:
            if type(pair) is not list or len(pair) != 2:
                raise wrong("a pair of key and value", pair)
            key = self.value(pair[0], depth + 1)
            if not is_key(key) or key in result:
                raise wrong("a key, or is one that the dict has already", pair[0])
            result[key] = self.value(pair[1], depth + 1)
        return result

    def _object(self, node: tuple[tuple[str, object], ...], depth: int) -> object:
        _check_depth(depth)
        result: dict[str, object] = {}
        for key, item in node:
            result[plain_text(key)] = self.value(item, depth + 1)
        if len(result) != len(node) or "$" in result:
            raise wrong("an object with different keys, '$' only as the first", tuple(key for key, _ in node))
        return result


def _tag(node: tuple[tuple[str, object], ...]) -> tuple[str, object, dict[str, object]]:
    """The name, the "v" and the other fields of a tag that the format has."""
    (_, name), *pairs = node
    rest = dict(pairs)
    if type(name) is not str or len(rest) != len(pairs) or rest.keys() != FIELDS.get(name, ()):
        raise wrong("a tag of this format", node)
    return name, rest.pop("v"), rest


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FormatError(f"typed JSON is nested more than {MAX_DEPTH} deep")
