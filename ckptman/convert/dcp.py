"""Directories of ``torch.distributed.checkpoint`` (DCP): a ``.metadata``, and items of ``torch.save`` in files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ckptman.convert import dcp_pickles, torch_file
from ckptman.convert.dcp_pickles import DcpMetadata, Key, Place, TensorEntry
from ckptman.convert.exported import Exported
from ckptman.convert.files import Files, Whole
from ckptman.convert.foreign import Foreign, ForeignTensor, is_optimizer
from ckptman.convert.placing import new_file, new_folder, placed
from ckptman.convert.stored import StoredCheckpoint, StoredTensor
from ckptman.errors import FormatError, UnsupportedState
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import MAX_NDIM
from ckptman.format.tiling import tiles
from ckptman.state.tensors import as_bytes, dtype_of, overwrite

METADATA = ".metadata"
DATA = "__0_0.distcp"

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

Path_ = tuple[str | int, ...]


def is_directory_of(path: Path) -> bool:
    """Whether *path* looks like a directory of DCP, complete or not."""
    return (path / METADATA).exists() or any(path.glob("*.distcp"))


def read(path: Path, files: Files) -> Foreign:
    """
    The components of the directory at *path*: the top-level keys of the state that was saved.

    Raises:
        FormatError: It is incomplete or damaged.
        UnsupportedState: Something in it would have to be unpickled.
    """
    if not (path / METADATA).is_file():
        raise FormatError(f"{path} is incomplete: {METADATA}, which DCP writes last, is missing")
    found = dcp_pickles.read(files.read(path / METADATA, limit=torch_file.MAX_PICKLE_NBYTES), str(path / METADATA))
    reader = _Reader(path, files, found)
    tree: dict[str | int, Any] = {}
    _refuse_huge_lists(found, str(path / METADATA))
    for name, entry in found.entries.items():
        value = reader.value(name) if entry is None else reader.tensor(name, entry)
        _place(tree, found.paths.get(name, (name,)), value, str(path / METADATA))
    state = {str(name): _numbered(value) for name, value in tree.items()}
    return Foreign(format="a directory of torch.distributed.checkpoint", parts=torch_file.split(state))


class _Reader:
    """The items of one directory."""

    def __init__(self, folder: Path, files: Files, metadata: DcpMetadata) -> None:
        self._folder = folder
        self._files = files
        self._places = metadata.places

    def value(self, name: str) -> Any:
        return self._item((name, None))

    def tensor(self, name: str, entry: TensorEntry) -> ForeignTensor:
        if entry.dtype not in DTYPES or len(entry.shape) > MAX_NDIM:
            raise FormatError(f"{self._folder}: {name!r:.80} is of {entry.dtype}, which the format cannot hold")
        boxes = [box for box in entry.chunks if all(box[1])]
        parts = [self._chunk(name, offset, shape, entry.dtype) for offset, shape in boxes]
        if len(boxes) == 1 and boxes[0][1] == entry.shape:
            return parts[0]
        nbytes = DTYPES[entry.dtype].itemsize
        for size in entry.shape:
            nbytes *= size
        if nbytes and not (_fit(boxes, entry.shape) and tiles(boxes, entry.shape)):
            raise FormatError(f"{self._folder} is incomplete: the chunks of {name!r:.80} do not make the tensor")
        pairs = list(zip(boxes, parts, strict=True))
        return ForeignTensor(entry.dtype, entry.shape, Whole(lambda: _assembled(entry, pairs), nbytes))

    def _chunk(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...], dtype: str) -> ForeignTensor:
        found = self._item((name, offset))
        if not isinstance(found, ForeignTensor) or (found.dtype, found.shape) != (dtype, shape):
            raise FormatError(f"{self._folder}: the chunk of {name!r:.80} at {offset} is not what {METADATA} says")
        return found

    def _item(self, key: Key) -> Any:
        place = self._places.get(key)
        if place is None:
            raise FormatError(f"{self._folder} is incomplete: {METADATA} does not say where {key[0]!r:.80} lies")
        name, start, nbytes = place
        if not _FILE.fullmatch(name):
            raise FormatError(f"{self._folder}: {METADATA} lists {name!r:.80}, which is not the name of a file in it")
        if not (self._folder / name).is_file():
            raise FormatError(f"{self._folder} is incomplete: {name} is missing")
        return torch_file.load(self._files.open(self._folder / name).whole().window(start, nbytes))


def _fit(boxes: list[dcp_pickles.Box], shape: tuple[int, ...]) -> bool:
    return all(
        len(offset) == len(size) == len(shape)
        and all(start + n <= whole for start, n, whole in zip(offset, size, shape, strict=True))
        for offset, size in boxes
    )


def _assembled(entry: TensorEntry, parts: list[tuple[dcp_pickles.Box, ForeignTensor]]) -> torch.Tensor:
    whole = torch.empty(entry.shape, dtype=dtype_of(entry.dtype))
    for (offset, shape), part in parts:
        chunk = torch.empty(shape, dtype=whole.dtype)
        part.data.read_into(0, as_bytes(chunk))
        box = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
        overwrite(box, chunk)
    return whole


MAX_HOLES = 1_000_000
"""Places in lists at which nothing lies: DCP leaves out what is empty."""


def _refuse_huge_lists(found: DcpMetadata, where: str) -> None:
    """A path may name the millionth place of a list: a few of these are a mistake, or made to take all memory."""
    longest: dict[Path_, int] = {}
    for name in found.entries:
        path = found.paths.get(name, (name,))
        for depth, key in enumerate(path):
            if type(key) is int:
                longest[path[:depth]] = max(longest.get(path[:depth], 0), key + 1)
    if sum(longest.values()) > MAX_HOLES + sum(map(len, found.paths.values())):
        raise FormatError(f"{where} describes lists of {sum(longest.values())} items, and has {len(found.entries)}")


def _place(tree: dict[str | int, Any], path: Path_, value: object, where: str) -> None:
    """Put *value* at *path*: a text is the key of a dict, a number the place in a list."""
    here: Any = tree
    for key, after in pairwise(path):
        inner = _get(here, key, where)
        if inner is None:
            inner = {} if type(after) is str else []
            _set(here, key, inner, where)
        here = inner
    _set(here, path[-1], value, where)


def _get(here: Any, key: str | int, where: str) -> Any:
    if isinstance(here, list) and type(key) is int:
        return here[key] if key < len(here) else None
    if isinstance(here, dict) and type(key) is str:
        return here.get(key)
    raise FormatError(f"{where} has paths that contradict each other, at {key!r:.80}")


def _set(here: Any, key: str | int, value: object, where: str) -> None:
    if _get(here, key, where) is not None:
        raise FormatError(f"{where} has two values at one path, {key!r:.80}")
    if isinstance(here, list):
        here.extend([None] * (int(key) + 1 - len(here)))
    here[key] = value


def _numbered(tree: Any) -> Any:
    """*tree*; the keys of an optimizer's state are numbers again where its groups have numbers. DCP makes them text."""
    if not is_optimizer(tree):
        return tree
    numbers = {str(number): number for group in tree["param_groups"] for number in group["params"]}
    if not tree["state"].keys() <= numbers.keys():
        return tree
    return {**tree, "state": {numbers[key]: value for key, value in tree["state"].items()}}


def write(source: StoredCheckpoint, path: Path, states: Callable[[], dict[str, Any]]) -> Exported:
    """A directory that DCP loads, in one file, with whole tensors; optimizers by the names of their parameters."""
    flat = dict(_flat((), states()))
    tensors = {name: value for name, (_, value) in flat.items() if isinstance(value, StoredTensor)}
    entries: dict[str, TensorEntry | None] = dict.fromkeys(flat)
    places: dict[Key, Place] = {}
    with placed(path) as temporary:
        new_folder(temporary)
        with new_file(temporary / DATA) as out:
            for name, (_, value) in flat.items():
                if name not in tensors:
                    places[name, None] = DATA, out.tell(), torch_file.write(out, value, source)
            by_tensor: dict[StoredTensor, list[str]] = {}
            for name, one in tensors.items():
                by_tensor.setdefault(one, []).append(name)
            for one, data in source.tensors(list(by_tensor)):
                place = DATA, out.tell(), torch_file.write_tensor(out, one, data)
                origin = (0,) * len(one.shape)
                for name in by_tensor[one]:
                    entries[name] = TensorEntry(one.dtype, one.shape, ((origin, one.shape),))
                    places[name, origin] = place
            nbytes = out.tell()
        paths = {name: where for name, (where, _) in flat.items()}
        metadata = dcp_pickles.write(DcpMetadata(entries, paths, places))
        with new_file(temporary / METADATA) as out:
            out.write(metadata)
    return Exported(
        checkpoint=source.checkpoint,
        path=path,
        nbytes=nbytes + len(metadata),
        components=source.components,
        left_out=source.left_out,
    )


def _flat(path: Path_, tree: Any) -> Iterator[tuple[str, tuple[Path_, Any]]]:
    """Every leaf of *tree* under its flat name, as DCP has it: dicts are flattened, and some lists."""
    if isinstance(tree, dict) and tree and (_holds_tensors(tree) or all(type(key) is str for key in tree)):
        is_state = path[-1:] == ("state",)
        for key, value in tree.items():
            if type(key) is not str and not (is_state and type(key) is int):
                raise UnsupportedState(f"{_name(path)} has the key {key!r}: DCP has text only", path=_name(path))
            yield from _flat((*path, str(key)), value)
    elif isinstance(tree, list | tuple) and _holds_tensors(tree):
        if type(tree) is tuple:
            raise UnsupportedState(f"{_name(path)} is a tuple of tensors: DCP would give back a list", path=_name(path))
        for index, value in enumerate(tree):
            yield from _flat((*path, index), value)
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for index, value in enumerate(tree):
            yield from _flat((*path, index), value)
    else:
        yield _name(path), (path, tree)


def _name(path: Path_) -> str:
    return ".".join(map(str, path))


def _holds_tensors(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_holds_tensors(value) for value in tree.values())
    if isinstance(tree, list | tuple):
        return any(_holds_tensors(value) for value in tree)
    return isinstance(tree, StoredTensor)
