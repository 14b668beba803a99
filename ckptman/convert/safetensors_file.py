"""
Plain safetensors: one file, or several behind an index.

A file that `write` made holds the whole of its components: their values stand in its ``__metadata__``, which other
tools pass over, and `read` takes them from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ckptman.convert.files import Files, Window
from ckptman.convert.foreign import Document, Foreign, ForeignTensor, Part, module
from ckptman.convert.stored import StoredCheckpoint, StoredTensor
from ckptman.errors import FormatError
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import MAX_HEADER_NBYTES
from ckptman.format.safetensors_layout import ALIGNMENT, FOREIGN, header_key, read_header

MAX_INDEX_NBYTES = 1 << 28
INDEX = ".safetensors.index.json"

TORCH_NAMES = {
    **{dtype.safetensors: name for name, dtype in DTYPES.items() if dtype.safetensors is not None},
    **FOREIGN,
}
"""What a header may call a type → torch's name of it."""

_SHARD = re.compile(r"[^/\\\x00]+\.safetensors")


def read(path: Path, files: Files) -> Foreign:
    """The tensors of the file or index at *path*, as one module."""
    if path.name.endswith(INDEX):
        return Foreign(format="safetensors", parts={"model": module(indexed(path, files))})
    entries = tensors(path, files)
    ours = _documents(files.open(path).whole())
    if ours is not None:
        return _with_documents(entries, ours, path)
    return Foreign(format="safetensors", parts={"model": module(entries)})


def is_file(path: Path, files: Files) -> bool:
    """Whether the file at *path* begins as such a file does, whatever its name: a plausible size, then JSON."""
    whole = files.open(path).whole()
    begin = whole.read(0, min(9, whole.nbytes))
    return begin[8:] == b"{" and 8 + int.from_bytes(begin[:8], "little") <= min(whole.nbytes, MAX_HEADER_NBYTES)


def tensors(path: Path, files: Files) -> dict[str, ForeignTensor]:
    """The tensors of one file, in the order of its header."""
    whole = files.open(path).whole()
    return {
        key: ForeignTensor(TORCH_NAMES[dtype], shape, Window(whole.file, start, stop - start))
        for key, (dtype, shape, start, stop) in _spans(whole).items()
    }


def _header(whole: Window) -> bytes:
    nbytes = int.from_bytes(whole.read(0, 8), "little")
    if nbytes > MAX_HEADER_NBYTES:
        raise FormatError(f"a header of {nbytes} bytes is impossible")
    return whole.read(0, 8 + nbytes)


def _spans(whole: Window) -> Mapping[str, tuple[str, tuple[int, ...], int, int]]:
    path = whole.file.path
    try:
        return read_header(_header(whole), whole.nbytes)
    except FormatError as error:
        raise FormatError(f"{path} is damaged, or no safetensors file: {error}") from error


def indexed(path: Path, files: Files) -> dict[str, ForeignTensor]:
    """
    The tensors of all files that the index at *path* lists.

    Raises:
        FormatError: A file is missing or damaged, or does not hold what the index says.
    """
    weights = _weight_map(files.read(path, limit=MAX_INDEX_NBYTES), path)
    shards: dict[str, dict[str, ForeignTensor]] = {}
    for name in dict.fromkeys(weights.values()):
        if not _SHARD.fullmatch(name):
            raise FormatError(f"{path} lists {name!r:.80}, which is not the name of a safetensors file beside it")
        if not (path.parent / name).is_file():
            raise FormatError(f"{path.parent} is incomplete: {path.name} lists {name}, which is missing")
        shards[name] = tensors(path.parent / name, files)
    lacking = [key for key, name in weights.items() if key not in shards[name]]
    if lacking:
        raise FormatError(f"{path.parent} is incomplete: {weights[lacking[0]]} lacks {lacking[0]!r:.80}")
    return {key: shards[name][key] for key, name in weights.items()}


def _weight_map(data: bytes, path: Path) -> dict[str, str]:
    try:
        index: Any = msgspec.json.decode(data)
        return msgspec.convert(index["weight_map"], dict[str, str])
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is no index of safetensors files: {error}") from error


class _Document(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One component in the metadata. ``tensors``: name → key, torch's dtype and shape."""

    kind: str
    values: str
    tensors: dict[str, tuple[str, str, tuple[int, ...]]]
    aliases: dict[str, str]


class _Metadata(msgspec.Struct, frozen=True):
    ckptman: str | None = None


class _Header(msgspec.Struct, frozen=True):
    metadata: _Metadata | None = msgspec.field(name="__metadata__", default=None)


class _Documents(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    step: int
    components: dict[str, _Document]
    format: int = 1


def _documents(whole: Window) -> _Documents | None:
    """What `write` left in the metadata; None where it was another tool's."""
    try:
        header = msgspec.json.decode(_header(whole)[8:], type=_Header)
        if header.metadata is None or header.metadata.ckptman is None:
            return None
        found = msgspec.json.decode(header.metadata.ckptman, type=_Documents)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{whole.file.path}: its metadata is not as ckptman writes it: {error}") from error
    if found.format > 1:
        raise FormatError(f"{whole.file.path} was written by a newer ckptman (format {found.format}): install it")
    return found


def _with_documents(entries: Mapping[str, ForeignTensor], found: _Documents, path: Path) -> Foreign:
    parts = {}
    for component, document in found.components.items():
        tensors = {}
        for name, (key, dtype, shape) in document.tensors.items():
            if key not in entries or not name.startswith(f"{component}/"):
                raise FormatError(f"{path}: its metadata speaks of {name!r:.80}, which is not there")
            tensors[name] = ForeignTensor(dtype, shape, entries[key].data)
        parts[component] = Part(document.kind, Document(document.values.encode(), tensors, document.aliases))
    return Foreign(format="safetensors of ckptman", parts=parts, step=found.step)


def write(out: BinaryIO, source: StoredCheckpoint) -> int:
    """
    Write all tensors of *source* to *out*, and its values into the metadata; return the bytes.

    A single component's tensors have their names within it, those of several ``<component>/<name>``. Types that
    safetensors does not have lie there as bytes (``U8``); the metadata knows what they are.
    """
    wanted = {name: source.stored(name) for name in source.components}
    keys = _keys({one.name: component for component, tensors in wanted.items() for one in tensors})
    documents = {
        component: _Document(
            kind=source.kind(component),
            values=bytes(source.manifest.components[component].values).decode(),
            tensors={one.name: (keys[one.name], one.dtype, one.shape) for one in tensors},
            aliases=source.aliases(component),
        )
        for component, tensors in wanted.items()
    }
    text = msgspec.json.encode(_Documents(step=source.checkpoint.step, components=documents)).decode()
    named = [(keys[one.name], one) for tensors in wanted.values() for one in tensors]
    return write_file(out, named, source, {"format": "pt", "ckptman": text})


def _keys(components: Mapping[str, str]) -> dict[str, str]:
    is_one = len(set(components.values())) == 1
    return {name: header_key(name.removeprefix(f"{owner}/") if is_one else name) for name, owner in components.items()}


def write_file(
    out: BinaryIO, named: Sequence[tuple[str, StoredTensor]], source: StoredCheckpoint, metadata: Mapping[str, str]
) -> int:
    """Write the tensors *named* to *out*, each under its key, with *metadata*; return the bytes."""
    order = sorted(named, key=lambda pair: -DTYPES[pair[1].dtype].itemsize)  # so that all are aligned
    fields: dict[str, object] = {"__metadata__": metadata}
    stop = 0
    for key, one in order:
        start, stop = stop, stop + one.nbytes
        dtype = NATIVE.get(one.dtype)
        shape = one.shape if dtype is not None else (one.nbytes,)
        fields[key] = {"dtype": dtype or "U8", "shape": shape, "data_offsets": (start, stop)}
    header = msgspec.json.encode(fields)
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    if len(header) > MAX_HEADER_NBYTES:
        raise FormatError(f"the values take {len(header)} bytes, more than the header of a safetensors file holds")
    out.write(len(header).to_bytes(8, "little") + header)
    for _, data in source.tensors([one for _, one in order]):
        out.write(data)
    return 8 + len(header) + stop


NATIVE = {dtype: name for name, dtype in TORCH_NAMES.items() if dtype != "float8_e8m0fnu"}
"""Torch's dtype → its name in a header that every tool may read. (safetensors 0.8 cannot load an F8_E8M0.)"""
