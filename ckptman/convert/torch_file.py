"""
The files of ``torch.save``: a zip archive of one pickle and of the bytes of every storage, uncompressed.

Reading takes the pickle apart with `read_pickle`, and leaves the bytes where they are. Writing streams: the pickle
names each tensor, then their bytes follow one after the other.
"""

from __future__ import annotations

import io
import itertools
import operator
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ckptman.convert import lightning
from ckptman.convert.files import Files, Window
from ckptman.convert.foreign import Foreign, Part, guessed, is_module, is_optimizer
from ckptman.convert.stored import StoredCheckpoint, StoredTensor
from ckptman.convert.streams import streams
from ckptman.convert.torch_pickles import STORAGES, TABLE, Storage, StorageType
from ckptman.convert.unpickling import read_pickle
from ckptman.errors import FormatError, UnsupportedState
from ckptman.format.dtypes import DTYPES
from ckptman.storage.base import Buffer

MAX_PICKLE_NBYTES = 1 << 30
_MAX_VERSION = 10  # what torch 2.13 itself reads
_LOCAL_HEADER = struct.Struct("<4s22xHH")
MAGIC = b"PK\x03\x04"


def read(path: Path, files: Files) -> Foreign:
    """The components of the file at *path*: its top-level keys, or one for a single state; or Lightning's."""
    tree = load(files.open(path).whole())
    if lightning.is_checkpoint(tree):
        return lightning.parts_of(tree)
    return Foreign(format="a file of torch.save", parts=split(tree))


def split(tree: Any) -> dict[str, Part]:
    """The components of what a file holds."""
    if is_module(tree):
        return {"model": guessed(tree)}
    if is_optimizer(tree):
        return {"optimizer": guessed(tree)}
    if not isinstance(tree, dict) or not all(type(key) is str for key in tree):
        return {"value": guessed(tree)}
    return {name: (streams(value) if name == "rng" else None) or guessed(value) for name, value in tree.items()}


def load(window: Window) -> Any:
    """
    What ``torch.save`` wrote into *window*; tensors are `ForeignTensor`.

    Raises:
        UnsupportedState: It needs more than plain data and tensors.
        FormatError: It is damaged, or no such file.
    """
    archive = _Archive(window)
    if archive.text("byteorder", "little") != "little":
        raise FormatError(f"{archive.where} was written on a big-endian machine, whose numbers are not converted")
    version = archive.text("version", "3")
    if not version.isdigit() or int(version) > _MAX_VERSION:
        raise FormatError(f"{archive.where} has version {version:.20}, which is newer than this ckptman knows")
    data = archive.record("data.pkl")
    if data.nbytes > MAX_PICKLE_NBYTES:
        raise FormatError(f"{archive.where}: a pickle of {data.nbytes} bytes is not plausible")
    return read_pickle(data.read(0, data.nbytes), TABLE, archive.storage, archive.where)


class _Archive:
    """The records of one archive. Nothing in it may be compressed, and no byte may serve twice."""

    def __init__(self, window: Window) -> None:
        self.where = str(window.file.path)
        self._window = window
        if window.nbytes < len(MAGIC) or window.read(0, len(MAGIC)) != MAGIC:
            raise FormatError(
                f"{self.where} is cut off, or no file that torch.save wrote since torch 1.6. Load an older one with "
                "torch.load(…, weights_only=True), and save it again"
            )
        try:
            with zipfile.ZipFile(window.stream()) as archive:
                records = archive.infolist()
        except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError) as error:
            raise FormatError(f"{self.where} is damaged or cut off: {error}") from error
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise FormatError(f"{self.where} holds compressed records, which torch.save does not write")
        if sum(record.file_size for record in records) > window.nbytes:
            raise FormatError(f"{self.where} claims more bytes than it has: its records overlap")
        self._records = {record.filename.partition("/")[2]: record for record in records}
        if "constants.pkl" in self._records:
            raise FormatError(f"{self.where} is a TorchScript program, not a checkpoint: save model.state_dict()")
        if len(self._records) != len(records):
            raise FormatError(f"{self.where} has a record twice")

    def record(self, name: str) -> Window:
        found = self._records.get(name)
        if found is None:
            raise FormatError(f"{self.where} is damaged: it has no record {name!r:.40}")
        header = self._window.read(found.header_offset, _LOCAL_HEADER.size)
        magic, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(header)
        if magic != MAGIC:
            raise FormatError(f"{self.where} is damaged at byte {found.header_offset}")
        start = found.header_offset + _LOCAL_HEADER.size + name_nbytes + extra_nbytes
        return self._window.window(start, found.file_size)

    def text(self, name: str, default: str) -> str:
        return (
            self.record(name).read(0, min(self.record(name).nbytes, 64)).decode("ascii", "replace").strip()
            if (name in self._records)
            else default
        )

    def storage(self, key: Any) -> object:
        kind, storage_type, name, _, count = key
        if kind != "storage" or type(storage_type) is not StorageType or type(name) is not str:
            raise ValueError("it refers to something else than a storage")
        window = self.record(f"data/{name}")
        itemsize = 1 if storage_type.dtype is None else DTYPES[storage_type.dtype].itemsize
        if type(count) is not int or count * itemsize != window.nbytes:
            raise FormatError(f"{self.where} is damaged: storage {name!r:.20} has {window.nbytes} bytes, not {count}")
        return Storage(window, storage_type.dtype)


def write(out: BinaryIO, tree: Any, source: StoredCheckpoint) -> int:
    """
    Write *tree* to *out* as ``torch.save`` would, the tensors from *source* one after the other; return the bytes.

    ``torch.load(…, weights_only=True)`` reads it. NumPy's arrays become tensors, since it would not read those.

    Raises:
        UnsupportedState: A value is of a type that it would not read.
        IntegrityError, StorageError: *source* is damaged, or a medium failed.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(_readable(tree, "state"))
    arrays: Iterator[tuple[str, Buffer]] = ((key, array.tobytes()) for key, array in pickler.arrays.items())
    tensors = ((pickler.tensors[stored], data) for stored, data in source.tensors(list(pickler.tensors)))
    return _write_archive(out, pickled.getvalue(), itertools.chain(arrays, tensors))


def write_tensor(out: BinaryIO, stored: StoredTensor, data: Buffer) -> int:
    """Write one tensor, with its bytes *data*, as ``torch.save(tensor, …)`` would; return the bytes."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(stored)
    return _write_archive(out, pickled.getvalue(), [(pickler.tensors[stored], data)])


def _write_archive(out: BinaryIO, pickled: bytes, storages: Iterable[tuple[str, Buffer]]) -> int:
    shifted = _Shifted(out)
    with zipfile.ZipFile(shifted, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, shifted, "data.pkl", pickled)
        _record(archive, shifted, "byteorder", b"little")
        for key, data in storages:
            _record(archive, shifted, f"data/{key}", data)
        _record(archive, shifted, "version", b"3\n")
    return shifted.tell()


class _Storage:
    """What a tensor's storage is while it is pickled."""

    __slots__ = ("count", "kind", "name")

    def __init__(self, name: str, dtype: str, nbytes: int) -> None:
        self.name = name
        short = next((short for short, known in STORAGES.items() if known == dtype), None)
        self.kind = torch.UntypedStorage if short is None else getattr(torch, f"{short}Storage")
        self.count = nbytes if short is None else nbytes // DTYPES[dtype].itemsize


class _Pickler(pickle.Pickler):
    """Writes tensors as references to records. Writing a pickle runs nothing, and reading is torch's affair."""

    def __init__(self, out: BinaryIO) -> None:
        super().__init__(out, protocol=2)
        self.tensors: dict[StoredTensor, str] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self._count = itertools.count()

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, _Storage):
            return ("storage", obj.kind, obj.name, "cpu", obj.count)
        return None

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, StoredTensor):
            name = self.tensors[obj] = str(next(self._count))
            return _rebuilding(_Storage(name, obj.dtype, obj.nbytes), obj.dtype, obj.shape)
        if isinstance(obj, np.ndarray):
            name, dtype = str(next(self._count)), str(obj.dtype)
            self.arrays[name] = np.ascontiguousarray(obj)
            return _rebuilding(_Storage(name, dtype, obj.nbytes), dtype, obj.shape)
        return NotImplemented


def _rebuilding(storage: _Storage, dtype: str, shape: tuple[int, ...]) -> tuple[object, tuple[object, ...]]:
    steps = tuple(itertools.accumulate((1, *(max(n, 1) for n in reversed(shape[1:]))), operator.mul)) if shape else ()
    hooks: OrderedDict[str, object] = OrderedDict()
    facts = (storage, 0, shape, tuple(reversed(steps)), False, hooks)
    if storage.kind is torch.UntypedStorage:
        return torch._utils._rebuild_tensor_v3, (*facts, getattr(torch, dtype))
    return torch._utils._rebuild_tensor_v2, facts


def _readable(value: Any, path: str) -> Any:
    """*value*, if ``weights_only`` lets it pass."""
    if isinstance(value, dict) and type(value) in _READABLE:
        for key, item in value.items():
            _readable(key, path)
            _readable(item, f"{path}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _readable(item, f"{path}[{index}]")
    elif type(value) is np.ndarray:
        if str(value.dtype) not in DTYPES:
            raise _unreadable(value, path)
    elif type(value) not in _READABLE:
        raise _unreadable(value, path)
    return value


def _unreadable(value: object, path: str) -> UnsupportedState:
    return UnsupportedState(
        f"{path} is a {type(value).__name__}, which torch.load(…, weights_only=True) does not read: "
        "export the other components",
        path=path,
    )


_READABLE = {type(None), bool, int, float, complex, str, bytes, dict, OrderedDict, Counter, StoredTensor} | {
    torch.Size,
    torch.dtype,
    torch.device,
}


def _record(archive: zipfile.ZipFile, out: _Shifted, name: str, data: Buffer) -> None:
    """One record, its bytes at a multiple of 64 so that torch can map them."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = memoryview(data).nbytes
    fixed = 30 + len(info.filename) + (_ZIP64_NBYTES if info.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0)
    padding = -(out.tell() + fixed + 4) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w") as record:
        record.write(data)


_ALIGNMENT = 64
_ZIP64_NBYTES = 20


class _Shifted(io.RawIOBase):
    """The rest of a file, from where it stands now, as a file of its own: an archive may lie in the middle of one."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._start = out.tell()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:  # type: ignore[override]  # its stub says any buffer; ours are named
        self._out.write(data)
        return memoryview(data).nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._out.seek(offset + self._start if whence == io.SEEK_SET else offset, whence) - self._start

    def tell(self) -> int:
        return self._out.tell() - self._start

    def flush(self) -> None:
        self._out.flush()
