"""
The ``.metadata`` of ``torch.distributed.checkpoint`` (DCP), read and written.

It is a pickle of DCP's own dataclasses. For reading, each of them stands in a closed table as a record of ours that
keeps the fields and nothing else; what it is called in the file is never looked up.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ckptman.convert.torch_pickles import TABLE as TORCH
from ckptman.convert.unpickling import Make, read_pickle

Box = tuple[tuple[int, ...], tuple[int, ...]]
Place = tuple[str, int, int]
Key = tuple[str, tuple[int, ...] | None]


class TensorEntry(NamedTuple):
    """A tensor: dtype, shape, and its chunks as (offset, shape)."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Box, ...]


class DcpMetadata(NamedTuple):
    """
    What a directory holds.

    Attributes:
        entries: Flat name → tensor; None for a value.
        paths: Flat name → its path in the nested state, where the file has them.
        places: Flat name and offset (None for a value) → file, first byte, bytes.
    """

    entries: dict[str, TensorEntry | None]
    paths: dict[str, tuple[str | int, ...]]
    places: dict[Key, Place]


def read(data: bytes, where: str) -> DcpMetadata:
    """
    What the bytes of a ``.metadata`` say.

    Raises:
        UnsupportedState: They name something else than DCP's classes.
        FormatError: They are damaged.
    """
    return read_pickle(data, _TABLE, _no_reference, where, _checked)


def _checked(value: object) -> DcpMetadata:
    if type(value) is not DcpMetadata:
        raise ValueError("it is no metadata of DCP")
    return value


def _no_reference(_: object) -> object:
    raise ValueError("it refers to something outside")


class _Record:
    """An object whose fields follow, and what becomes of them."""

    __slots__ = ("_make", "keys")

    def __init__(self, make: Callable[[Any], object]) -> None:
        self._make = make
        self.keys: list[int] = []

    def built(self, state: Any) -> object:
        return self._make(state)


def _properties(state: Any) -> str:
    fields = state if isinstance(state, tuple) else (state["dtype"], "torch.strided")
    if not isinstance(fields[0], torch.dtype) or fields[1] != "torch.strided":
        raise ValueError("a tensor is not an ordinary one")
    return str(fields[0]).removeprefix("torch.")


def _tensor(state: Any) -> TensorEntry:
    if not all(type(chunk) is _Chunk for chunk in state["chunks"]):
        raise TypeError("the chunks of a tensor are none")
    return TensorEntry(str(state["properties"]), _sizes(state["size"]), tuple(tuple(c) for c in state["chunks"]))


class _Chunk(NamedTuple):
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class _Value(NamedTuple):
    """The entry of a value."""


class _Index(NamedTuple):
    name: str
    offset: tuple[int, ...] | None


class _Place(NamedTuple):
    file: str
    start: int
    nbytes: int


def _index(state: Any) -> _Index:
    offset = state.get("offset")
    if type(state["fqn"]) is not str:
        raise TypeError("a tensor has no name")
    return _Index(state["fqn"], None if offset is None else _sizes(offset))


def _place(state: Any) -> _Place:
    path, start, nbytes = state["relative_path"], state["offset"], state["length"]
    if type(path) is not str or type(start) is not int or type(nbytes) is not int:
        raise TypeError("a place is none")
    transforms = state.get("transform_descriptors")
    if transforms:
        first = next((one for one in transforms if type(one) is str), "a transform")
        raise ValueError(f"{path:.80} was written through {first:.40}, which is not undone here")
    return _Place(path, start, nbytes)


def _metadata(state: Any) -> DcpMetadata:
    entries = state["state_dict_metadata"]
    if not all(type(name) is str and type(entry) in (TensorEntry, _Value) for name, entry in entries.items()):
        raise TypeError("an entry is neither a tensor nor a value")
    places = state.get("storage_data") or {}
    if not all(type(key) is _Index and type(place) is _Place for key, place in places.items()):
        raise TypeError("a place is none")
    return DcpMetadata(
        entries={name: entry if type(entry) is TensorEntry else None for name, entry in entries.items()},
        paths=_paths(state.get("planner_data")),
        places={tuple(key): tuple(place) for key, place in places.items()},
    )


def _paths(planned: Any) -> dict[str, tuple[str | int, ...]]:
    if planned is None:
        return {}
    for name, path in planned.items():
        if type(path) is not tuple or not path or not all(type(key) in (str, int) for key in path):
            raise TypeError(f"{name!r:.80} has no path")
        if any(type(key) is int and not 0 <= key < _MAX_ITEMS for key in path):
            raise ValueError(f"{name!r:.80} has an impossible path")
    return dict(planned)


_MAX_ITEMS = 1_000_000


def _sizes(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or not all(type(size) is int and size >= 0 for size in sizes):
        raise TypeError("a shape is none")
    return tuple(sizes)


def _record(make: Callable[[Any], object]) -> Make:
    return Make(lambda *_: _Record(make))


_HOME = "torch.distributed.checkpoint"
_TABLE: Mapping[str, object] = {
    **{name: TORCH[name] for name in TORCH if name.startswith("torch.") and isinstance(TORCH[name], torch.dtype)},
    "torch.Size": TORCH["torch.Size"],
    "collections.OrderedDict": TORCH["collections.OrderedDict"],
    "torch.serialization._get_layout": Make(lambda name: name),
    f"{_HOME}.metadata._MEM_FORMAT_ENCODING": Make(lambda number: number),
    f"{_HOME}.metadata.TensorProperties": _record(_properties),
    f"{_HOME}.metadata.ChunkStorageMetadata": _record(
        lambda state: _Chunk(_sizes(state["offsets"]), _sizes(state["sizes"]))
    ),
    f"{_HOME}.metadata.TensorStorageMetadata": _record(_tensor),
    f"{_HOME}.metadata.BytesStorageMetadata": Make(lambda *_: _Value()),
    f"{_HOME}.metadata.MetadataIndex": _record(_index),
    f"{_HOME}.metadata.StorageMeta": _record(lambda _: None),
    f"{_HOME}.metadata.Metadata": _record(_metadata),
    f"{_HOME}.filesystem._StorageInfo": _record(_place),
    **{
        f"{module}.{name}": Make(lambda *parts: "/".join(map(str, parts)))
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


def write(metadata: DcpMetadata) -> bytes:
    """The bytes of a ``.metadata`` that DCP reads."""
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint import metadata as classes

    def entry(tensor: TensorEntry | None) -> Any:
        if tensor is None:
            return classes.BytesStorageMetadata()
        return classes.TensorStorageMetadata(
            properties=classes.TensorProperties(dtype=getattr(torch, tensor.dtype)),
            size=torch.Size(tensor.shape),
            chunks=[
                classes.ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
                for offset, shape in tensor.chunks
            ],
        )

    return pickle.dumps(
        classes.Metadata(
            state_dict_metadata={name: entry(tensor) for name, tensor in metadata.entries.items()},
            planner_data=metadata.paths,
            storage_data={
                classes.MetadataIndex(name, offset): filesystem._StorageInfo(*place)
                for (name, offset), place in metadata.places.items()
            },
        ),
        protocol=4,
    )
