"""The names that torch's own files use, and what each stands for here: the closed table of ``torch.save``."""

from __future__ import annotations

import codecs
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from ckptman.convert import numpy_pickles
from ckptman.convert.files import Whole, Window
from ckptman.convert.foreign import ForeignTensor
from ckptman.convert.unpickling import Make, plain
from ckptman.errors import FormatError
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import MAX_NDIM
from ckptman.state.tensors import as_bytes


class Storage:
    """A storage of the file: ``dtype`` is None for an untyped one."""

    __slots__ = ("dtype", "window")

    def __init__(self, window: Window, dtype: str | None) -> None:
        self.window = window
        self.dtype = dtype


class StorageType:
    """What a class of storages says: the dtype of the elements, or None."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str | None) -> None:
        self.dtype = dtype


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, metadata: Any = None) -> object:
    if type(storage) is not Storage or storage.dtype is None:
        raise ValueError("a tensor has no storage with a type")
    return _view(storage.window, storage.dtype, offset, size, stride, metadata)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> object:
    if type(storage) is not Storage or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no storage, or no type")
    return _view(storage.window, str(dtype).removeprefix("torch."), offset, size, stride, metadata)


def _view(window: Window, dtype: str, offset: Any, size: Any, stride: Any, metadata: Any) -> ForeignTensor:
    shape, strides = _counts(size), _counts(stride)
    if dtype not in DTYPES:
        raise FormatError(f"{window.file.path} has tensors of {dtype}, which the format cannot hold")
    if type(offset) is not int or offset < 0 or len(shape) != len(strides) or len(shape) > MAX_NDIM:
        raise ValueError("a tensor has an impossible shape")
    itemsize = DTYPES[dtype].itemsize
    nbytes = math.prod(shape) * itemsize
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if nbytes else 0
    inner = window.window(offset * itemsize, reach * itemsize)
    bits = tuple(sorted(key for key, value in (metadata or {}).items() if value is True and key in ("conj", "neg")))
    tie = (window.file.path, inner.start, shape, strides, dtype, bits) if nbytes else None
    if _is_row_major(shape, strides) and not bits:
        return ForeignTensor(dtype, shape, inner, tie)
    if nbytes > _MAX_EXPANSION * max(inner.nbytes, 1):
        raise FormatError(f"{window.file.path} has a tensor {list(shape)} that repeats {inner.nbytes} bytes on purpose")
    return ForeignTensor(dtype, shape, Whole(lambda: _made(inner, dtype, shape, strides, bits), nbytes), tie)


_MAX_EXPANSION = 1 << 16


def _made(inner: Window, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], bits: tuple[str, ...]) -> Any:
    data = torch.empty(inner.nbytes, dtype=torch.uint8)
    inner.read_into(0, as_bytes(data))
    # as_strided of wide elements would need kernels that some types lack: their bytes are gathered instead
    itemsize = DTYPES[dtype].itemsize
    raw = data.as_strided((*shape, itemsize), (*(step * itemsize for step in strides), 1)).contiguous()
    tensor: torch.Tensor = raw.reshape(-1).view(getattr(torch, dtype)).reshape(shape)
    for bit in bits:
        tensor = tensor.conj_physical() if bit == "conj" else -tensor
    return tensor.contiguous()


def _counts(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
        raise ValueError("a tensor has an impossible shape")
    return tuple(sizes)


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return math.prod(shape) == 0
        step *= n
    return True


def _parameter(data: Any, *_: object) -> object:
    if not isinstance(data, ForeignTensor):
        raise TypeError("a parameter is not made of a tensor")
    return data


def _ordered(*arguments: Any) -> OrderedDict[Any, Any]:
    return OrderedDict(*arguments)


def _encoded(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes are spelled in an unknown way")
    return codecs.latin_1_encode(text)[0]


_BUILTINS: Mapping[str, object] = {
    "set": Make(lambda items=(): set(items)),
    "complex": Make(lambda real, imag: complex(float(real), float(imag))),
}


STORAGES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}

TABLE: dict[str, object] = {
    **numpy_pickles.TABLE,
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": StorageType(None),
    "torch._utils._rebuild_tensor_v2": Make(_tensor),
    "torch._utils._rebuild_tensor_v3": Make(_tensor_v3),
    "torch._utils._rebuild_parameter": Make(_parameter),
    "torch.Size": Make(lambda sizes: torch.Size(_counts(tuple(sizes)))),
    "torch.device": Make(lambda kind, index=None: torch.device(kind) if index is None else torch.device(kind, index)),
    **{f"torch.{name}": getattr(torch, name) for name in DTYPES if hasattr(torch, name)},
    "collections.OrderedDict": Make(_ordered),
    "collections.Counter": Make(lambda counts=None: plain(counts or {})),
    "_codecs.encode": Make(_encoded),
    **{f"{home}.{name}": make for home in ("builtins", "__builtin__") for name, make in _BUILTINS.items()},
}
"""What a file of ``torch.save`` may name. torch's own ``weights_only`` table has a few more: of those, none is data."""
