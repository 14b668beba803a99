"""
Typed values: the non-tensor part of a state as JSON, in a closed set of types, without pickle.

JSON's own types stand for themselves: null, booleans, whole numbers up to ±(2**53 - 1), finite floats (always with
``.`` or ``e``), strings, lists, and dicts whose keys are strings. Everything else is a *tag*: an object whose first
key is ``"$"``, which names the type::

    (1, 2)     {"$":"tuple","v":[1,2]}
    {3: 0.5}   {"$":"dict","v":[[3,0.5]]}
    2**80      {"$":"int","v":"0x100000000000000000000"}

The whole table is in docs/reference/format.md. The set is closed by exact type: an instance of a subclass
(a defaultdict, a namedtuple, an enum) is never mistaken for its parent, since it would come back as something else.
Values come back equal, in their types and orders, floats bit for bit. *Not* kept: that two places share one object.

Writing is here; reading, which trusts nothing, is in `ckptman.format.values_reading`.
"""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import cast

import msgspec
import numpy as np

from ckptman.errors import UnsupportedState
from ckptman.format.markers import ArrayRef, Marker, Ready, TensorRef, TorchDevice, TorchDtype, TorchSize
from ckptman.format.numpy_values import MAX_INLINE_NBYTES, numpy_tree
from ckptman.format.strict_json import is_plain_text, to_base64
from ckptman.format.value_tags import MAX_PLAIN_INT, is_key
from ckptman.format.values_reading import MAX_DEPTH, from_json

__all__ = [
    "ArrayRef",
    "Marker",
    "Ready",
    "TensorRef",
    "TorchDevice",
    "TorchDtype",
    "TorchSize",
    "are_plain_keys",
    "from_json",
    "tensor_tree",
    "to_json",
]

Extract = Callable[[object, str], Marker | None]
ExtractAll = Callable[[dict[str, object], str], Sequence[str] | None]


def _nothing(value: object, path: str) -> None:
    """Extract nothing: the default."""


def to_json(value: object, path: str, extract: Extract = _nothing, *, extract_all: ExtractAll = _nothing) -> bytes:
    """
    Encode *value* as typed JSON; `from_json` gives it back.

    For every object outside of Python's own closed types, *extract* is asked first: it may take a tensor out of the
    state and return a marker in its place, or None. Only then are NumPy's scalars and small arrays encoded inline.

    Args:
        value: The state of a component, or a part of it.
        path: Where *value* is, such as ``loader``; the prefix of every path in messages and for *extract*,
            which read like Python: ``loader.sampler['rng'][3]``. Elements of a set have no index: ``loader{…}``.
        extract: Called with an object and its path.
        extract_all: Called before with a whole dict whose keys are plain text, and its path. If all of its values are
            tensors it may take them out at once, and return their names; or None, and they are extracted one by one.

    Raises:
        UnsupportedState: Something in *value* is outside of the closed set, nested more than 200 deep, or contains
            itself. Its ``path`` says where.
    """
    try:
        return msgspec.json.encode(_Writing(extract, extract_all).tree(value, path, 1))
    except RecursionError as error:
        raise _too_deep(path) from error


class _Writing:
    """One walk over a value: turns it into a tree of what JSON can say."""

    __slots__ = ("_extract", "_extract_all")

    def __init__(self, extract: Extract, extract_all: ExtractAll) -> None:
        self._extract = extract
        self._extract_all = extract_all

    def tree(self, value: object, path: str, depth: int) -> object:
        """*value* as a tree; *depth* counts the containers around it, itself included if it is one."""
        kind = type(value)
        scalar = _SCALARS.get(kind)
        if scalar is not None:
            return scalar(value)
        container = _CONTAINERS.get(kind)
        if container is None:
            return self._foreign(value, path)
        if depth > MAX_DEPTH:
            raise _too_deep(path)
        return container(self, value, path, depth + 1)

    def items(self, values: Collection[object], path: str, depth: int) -> list[object]:
        if _are_plain_ints(values):
            return list(values)  # a shape, the state of a random stream: as they are, without a path for each
        return [self.tree(value, f"{path}[{index}]", depth) for index, value in enumerate(values)]

    def pairs(self, values: dict[object, object], path: str, depth: int) -> list[list[object]]:
        return [
            [self._key(key, path, depth), self.tree(value, f"{path}[{_shown(key)}]", depth)]
            for key, value in values.items()
        ]

    def dict(self, values: dict[object, object], path: str, depth: int) -> object:
        tree = self.tree
        if are_plain_keys(values):
            names = self._extract_all(cast("dict[str, object]", values), path)
            if names is not None:
                return dict(zip(values, map(tensor_tree, names), strict=True))
            return {key: tree(value, f"{path}[{key!r}]", depth) for key, value in values.items()}
        return {"$": "dict", "v": self.pairs(values, path, depth)}

    def elements(self, values: Iterable[object], path: str, depth: int) -> list[object]:
        """The elements of a set in the order of their JSON: the same bytes for the same set, in every process."""
        return sorted((self.tree(value, f"{path}{{…}}", depth) for value in values), key=msgspec.json.encode)

    def _key(self, key: object, path: str, depth: int) -> object:
        if not is_key(key):
            raise UnsupportedState(
                f"cannot save {path:.200}: one of its keys is of type {_kind(key)}; "
                "keys may be scalars and tuples of scalars",
                path=path,
            )
        return self.tree(key, f"{path}.keys()", depth)

    def _foreign(self, value: object, path: str) -> object:
        marker = self._extract(value, path)
        if marker is not None:
            return _marker_tree(marker)
        tree = numpy_tree(value)
        if tree is None:
            raise _unsupported(value, path)
        return tree


def are_plain_keys(keys: Collection[object]) -> bool:
    """Whether a dict with *keys* stands for itself in JSON."""
    # all at once: a state may have very many
    return "$" not in keys and {str}.issuperset(map(type, keys)) and is_plain_text("".join(cast("Iterable[str]", keys)))


def _are_plain_ints(values: Collection[object]) -> bool:
    if not {int}.issuperset(map(type, values)):
        return False
    numbers = cast("Collection[int]", values)
    return not numbers or (min(numbers) >= -MAX_PLAIN_INT and max(numbers) <= MAX_PLAIN_INT)


def _shown(key: object) -> str:
    """A key as it stands in a path."""
    try:
        return repr(key)
    except ValueError:  # an integer of more digits than Python prints
        return to_json(key, "").decode()


def _int(value: int) -> object:
    return value if -MAX_PLAIN_INT <= value <= MAX_PLAIN_INT else {"$": "int", "v": hex(value)}


def _float(value: float) -> object:
    if math.isfinite(value):
        return value
    return {"$": "float", "v": f"nan:{struct.pack('>d', value).hex()}" if math.isnan(value) else str(value)}


def _str(value: str) -> object:
    if is_plain_text(value):
        return value
    return {"$": "str", "v": to_base64(value.encode("utf-8", "surrogatepass"))}


def _deque(maxlen: int | None, items: list[object]) -> object:
    return {"$": "deque", "maxlen": maxlen if maxlen is None else _int(maxlen), "v": items}


_PATH = type(Path())

_SCALARS: dict[type, Callable[..., object]] = {
    type(None): lambda _: None,
    bool: lambda value: value,
    int: _int,
    float: _float,
    str: _str,
    bytes: lambda value: {"$": "bytes", "v": to_base64(value)},
    complex: lambda value: {"$": "complex", "v": [_float(value.real), _float(value.imag)]},
    _PATH: lambda value: {"$": "path", "v": _str(value.as_posix())},
}

_CONTAINERS: dict[type, Callable[..., object]] = {
    list: _Writing.items,
    dict: _Writing.dict,
    tuple: lambda w, value, path, depth: {"$": "tuple", "v": w.items(value, path, depth)},
    set: lambda w, value, path, depth: {"$": "set", "v": w.elements(value, path, depth)},
    frozenset: lambda w, value, path, depth: {"$": "frozenset", "v": w.elements(value, path, depth)},
    OrderedDict: lambda w, value, path, depth: {"$": "OrderedDict", "v": w.pairs(value, path, depth)},
    Counter: lambda w, value, path, depth: {"$": "Counter", "v": w.pairs(value, path, depth)},
    deque: lambda w, value, path, depth: _deque(value.maxlen, w.items(value, path, depth)),
    Ready: lambda w, value, path, depth: value.tree,
}


def _marker_tree(marker: Marker) -> object:
    if type(marker) is TensorRef:
        return tensor_tree(marker.name)
    if isinstance(marker, TorchSize):
        return {"$": "torch.Size", "v": [_int(size) for size in marker.sizes]}
    return {"$": _MARKER_TAGS[type(marker)], "v": _str(marker.name)}


def tensor_tree(name: str) -> object:
    """What stands for the tensor called *name*."""
    return {"$": "tensor", "v": name if name.isascii() else _str(name)}  # the short way for what there is most of


_MARKER_TAGS: dict[type, str] = {
    ArrayRef: "array",
    TorchDtype: "torch.dtype",
    TorchDevice: "torch.device",
}


def _kind(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _unsupported(value: object, path: str) -> UnsupportedState:
    array = f" of {value.dtype} with {value.nbytes} bytes" if isinstance(value, np.ndarray) else ""
    return UnsupportedState(
        f"cannot save {path:.200}: {_kind(value)}{array} is not among the types that are saved without pickle. "
        "Keep it out of the state, or give the object that holds it state_dict and load_state_dict, or convert it "
        "to plain values (numbers, text, bytes, lists, tuples, dicts, sets, tensors, "
        f"NumPy arrays of up to {MAX_INLINE_NBYTES} bytes)",
        path=path,
    )


def _too_deep(path: str) -> UnsupportedState:
    return UnsupportedState(
        f"cannot save {path:.200}: it is nested more than {MAX_DEPTH} deep, or contains itself. Flatten it, or keep "
        "it out of the state",
        path=path,
    )
