"""The plain values of a checkpoint, as people can read them: decoded, and shortened where they are long."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np

from ckptman.format.markers import ArrayRef, TensorRef, TorchDevice, TorchDtype, TorchSize
from ckptman.format.values_reading import from_json

MAX_FIELDS = 20
MAX_ITEMS = 6
MAX_TEXT = 200

_FLAT_LIST = re.compile(r"\[\s+((?:[^\[\]{}\"\s]\S*\s+|\"(?:[^\"\\]|\\.)*\",?\s+)+)\]")
_TAG = "$"
_PAIRED = ("dict", "OrderedDict", "Counter")


def readable(values: bytes | memoryview) -> object:
    """
    The typed JSON *values* of a component as plain JSON, shortened. Not exact, and not meant to be read back.

    Tensors are left out of dicts: a checkpoint's own table has them.
    """
    value = from_json(memoryview(values))
    if isinstance(value, dict) and value.keys() == {"state"}:
        value = value["state"]
    return _plain(value)


def pretty(value: object) -> str:
    """*value*, as `readable` made it, as indented JSON in which a list of scalars takes one line."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    return _FLAT_LIST.sub(lambda match: f"[{' '.join(match[1].split())}]", text)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return _plain_dict(value)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return _plain_list(value)
    if value is None or isinstance(value, (bool, int)):
        return value if value is None or abs(value) < 1 << 63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _plain_text(value)


def _plain_dict(value: Mapping[object, object]) -> dict[str, object]:
    decoded = ((str(key), item, _plain(item)) for key, item in value.items())
    filled = {key: plain for key, item, plain in decoded if not _is_left_out(item, plain)}
    short = dict(islice(filled.items(), MAX_FIELDS))
    if len(filled) > MAX_FIELDS:
        short["…"] = f"{len(filled) - MAX_FIELDS} more"
    return short


def _is_left_out(item: object, plain: object) -> bool:
    """Whether *item* is a tensor, or held nothing but tensors."""
    return isinstance(item, (TensorRef, ArrayRef)) or (plain == {} and bool(item))


def _plain_list(value: list[object] | tuple[object, ...] | set[object] | frozenset[object] | deque[object]) -> object:
    items = [_plain(item) for item in islice(value, MAX_ITEMS)]
    return [*items, f"… {len(value) - MAX_ITEMS} more"] if len(value) > MAX_ITEMS else items


def _plain_text(value: object) -> str:
    match value:
        case TensorRef(name) | ArrayRef(name):
            return f"<tensor {name}>"
        case TorchDtype(name):
            return f"torch.{name}"
        case TorchDevice(name):
            return name
        case TorchSize(sizes):
            return f"torch.Size({list(sizes)})"
        case np.ndarray():
            return f"<array {value.dtype} {list(value.shape)}>"
        case bytes():
            return f"<{len(value)} bytes>"
        case _:
            text = " ".join(str(value).split())
            return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"


def changed_values(a: bytes | memoryview, b: bytes | memoryview) -> Iterator[tuple[str, object, object]]:
    """
    Where the typed JSON *a* and *b* differ: a path such as ``epoch`` or ``groups[0].lr``, and both readable values.

    Compared exactly, as they are encoded. None stands for what only the other side has. Long lists that differ in
    many places are reported as a whole.
    """
    return _changes("", json.loads(bytes(a)), json.loads(bytes(b)))


def _changes(path: str, a: object, b: object) -> Iterator[tuple[str, object, object]]:
    if a == b and json.dumps(a) == json.dumps(b):  # 1 == 1.0 == True, but their texts differ
        return
    fields_a, fields_b = _fields(a), _fields(b)
    if fields_a is not None and fields_b is not None and _kind(a) == _kind(b):
        for key in dict.fromkeys([*fields_a, *fields_b]):
            yield from _changes(f"{path}{key}", fields_a.get(key), fields_b.get(key))
    else:
        yield path.removeprefix("."), _decoded(a), _decoded(b)


def _fields(node: object) -> dict[str, object] | None:
    """The parts of a container by how they are written in a path; None for what is compared as a whole."""
    if isinstance(node, list):
        return {f"[{index}]": item for index, item in enumerate(node)} if len(node) <= MAX_ITEMS else None
    if not isinstance(node, dict):
        return None
    if _TAG not in node:
        return {f".{key}": item for key, item in node.items()}
    if node[_TAG] in _PAIRED:
        return {f"[{json.dumps(key)}]": item for key, item in node["v"]}
    return _fields(node["v"]) if node[_TAG] == "tuple" else None


def _kind(node: object) -> object:
    return node.get(_TAG, "object") if isinstance(node, dict) else type(node)


def _decoded(node: object) -> object:
    return _plain(from_json(json.dumps(node).encode()))
