"""
Single tensors: their bytes, their types, which of them cannot be saved, and how to write into one that lives.

What torch can express and a file cannot (views, ties, conjugate bits, layouts) is dealt with here or in
`ckptman.state.layouts`; above, a tensor is a name, a dtype, a shape and its bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import cast

import numpy as np
import torch
from torch.nn.parameter import Parameter, is_lazy

from ckptman.errors import UnsupportedState
from ckptman.format.dtypes import DTYPES
from ckptman.state import dtensor
from ckptman.state.dtensor import is_sharded

_BY_NAME: dict[str, torch.dtype] = {
    name: dtype for name in DTYPES if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
_BY_DTYPE = {dtype: name for name, dtype in _BY_NAME.items()}

# torch can hold these, but has no kernel that copies them: their bits are copied as bytes
_WITHOUT_COPY = frozenset(
    dtype
    for name, dtype in _BY_NAME.items()
    if DTYPES[name].itemsize == 1 and name.rstrip("1234567") in ("int", "uint")
)

_IN_NUMPY = frozenset({torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool})

TieKey = tuple[object, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """How the format calls *dtype*: ``float32``. Raises UnsupportedState for a dtype that the format cannot hold."""
    name = _BY_DTYPE.get(dtype)
    if name is None:
        raise UnsupportedState(f"tensors of {dtype} cannot be saved: the format has no such element type")
    return name


def dtype_of(name: str) -> torch.dtype:
    """The dtype that the format calls *name*. Raises UnsupportedState where the running torch has none."""
    dtype = _BY_NAME.get(name)
    if dtype is None:
        raise UnsupportedState(f"this torch ({torch.__version__}) has no dtype {name!r}: install a newer torch")
    return dtype


def is_storable(dtype: torch.dtype) -> bool:
    """Whether the format can hold *dtype*."""
    return dtype in _BY_DTYPE


def has_copy_kernel(dtype: torch.dtype) -> bool:
    """Whether torch can copy tensors of *dtype*; if not, their bytes can be copied where they are contiguous."""
    return dtype not in _WITHOUT_COPY


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """
    The bytes of *tensor* in row-major order, as a view: no copy, and writing into it writes into the tensor.

    Args:
        tensor: On the CPU and contiguous, without a conjugate or negative bit; any dtype, 0-dim and empty ones too.

    Raises:
        ValueError: *tensor* is none of that.
    """
    if not tensor.is_cpu or not is_row_major(tensor):
        raise ValueError(f"only contiguous CPU tensors have their bytes in order, got {describe(tensor)}")
    if tensor.dtype in _IN_NUMPY and tensor.numel():
        whole: np.ndarray = tensor.numpy(force=True) if tensor.requires_grad else tensor.numpy()
        return whole.data.cast("B")  # the short way, for states of very many tensors
    array: np.ndarray = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array.data


def is_row_major(tensor: torch.Tensor) -> bool:
    """Whether the memory of *tensor* is its elements in row-major order, as they are."""
    return tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether *tensor* is of torch's own classes and not of a subclass."""
    return type(tensor) is torch.Tensor or type(tensor) is Parameter


def plain_view(tensor: torch.Tensor) -> torch.Tensor:
    """
    *tensor* detached and without conjugate and negative bits. Shares its memory, except where a bit had to be
    resolved, and where a dtype without a copy kernel is not contiguous.
    """
    detached = tensor.detach()
    if detached.is_conj() or detached.is_neg():
        detached = detached.resolve_conj().resolve_neg()
    if detached.dtype in _WITHOUT_COPY and not detached.is_contiguous():
        return detached.view(torch.uint8).contiguous().view(detached.dtype)
    return detached


def tie_key(tensor: torch.Tensor) -> TieKey:
    """Equal for two live strided tensors that are one: the same elements of the same memory, read the same way."""
    if not is_plain(tensor) and is_sharded(tensor):
        held = dtensor.local(tensor)
        return (*(tie_key(held) if held.numel() else (id(tensor),)), tensor.shape)
    if tensor.numel() == 0:
        return (id(tensor),)
    place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return (*place, tensor.is_conj(), tensor.is_neg())


def address(tensor: torch.Tensor) -> int:
    """Equal for tensors that are one, and for few others: `tie_key` tells. Empty ones have no address but their own."""
    held = tensor if is_plain(tensor) or not is_sharded(tensor) else dtensor.local(tensor)
    return held.data_ptr() or id(tensor)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory (an expanded tensor, a sliding window): such cannot be written to."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (size - 1)
    return False


def is_fillable(tensor: torch.Tensor) -> bool:
    """Whether a reader may write into *tensor*, from any thread, what its bytes are to be."""
    if not is_plain(tensor) and is_sharded(tensor):
        return is_fillable(dtensor.local(tensor))
    if tensor.is_conj() or tensor.is_neg() or tensor.is_inference():
        return False
    return tensor.is_contiguous() or (tensor.dtype not in _WITHOUT_COPY and not overlaps_itself(tensor))


def fresh(
    dtype: torch.dtype, shape: tuple[int, ...], *, device: torch.device, like: torch.Tensor | None
) -> torch.Tensor:
    """An uninitialised tensor, in the memory format of *like* where that has the same shape, and sharded as it is."""
    if like is not None and is_sharded(like) and shape and tuple(like.shape) == shape:
        return dtensor.like(like, dtype)
    if like is None or not is_plain(like) or like.layout != torch.strided or tuple(like.shape) != shape:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty_like(like.detach(), dtype=dtype, device=device)


def overwrite(live: torch.Tensor, source: torch.Tensor) -> None:
    """
    Give *live* the values of *source*, of equal dtype and shape.

    The object stays; where it cannot be written to (expanded, sparse), its memory is exchanged.
    """
    with torch.inference_mode(live.is_inference()), torch.no_grad():
        if is_sharded(live):
            dtensor.overwrite(live, source)
        elif live.layout != torch.strided or overlaps_itself(live):
            # an inference tensor must stay one: a copy that is made here is
            live.data = source.to(live.device, copy=live.is_inference())
        elif live.dtype in _WITHOUT_COPY:
            live.detach().view(torch.uint8).copy_(source.view(torch.uint8))
        else:
            live.detach().copy_(source)


def overwrite_part(live: torch.Tensor, start: int, data: torch.Tensor) -> None:
    """
    Give *live* the bytes *data* from byte *start* of its row-major order on.

    Args:
        live: What `is_fillable` lets pass, or a part of such; on any device.
        start: At the beginning of an element.
        data: Bytes of whole elements, on the CPU.
    """
    if live.dtype in _WITHOUT_COPY:  # then it is contiguous
        _place(live.view(torch.uint8), start, data)
    else:
        _place(live, start // live.element_size(), data.view(live.dtype))


def _place(live: torch.Tensor, start: int, values: torch.Tensor) -> None:
    """Copy *values* to the elements of *live* from number *start* on: a part of a row, whole rows, a part of a row."""
    if live.is_contiguous():
        live.view(-1)[start : start + len(values)].copy_(values)
        return
    row_size = live[0].numel()
    row, skipped = divmod(start, row_size)
    if skipped or len(values) < row_size:
        head = min(row_size - skipped, len(values))
        _place(live[row], skipped, values[:head])
        row, values = row + 1, values[head:]
    count = len(values) // row_size
    live[row : row + count].copy_(values[: count * row_size].view(count, *live.shape[1:]))
    if rest := len(values) - count * row_size:
        _place(live[row + count], 0, values[-rest:])


def describe(tensor: torch.Tensor) -> str:
    """*tensor* for people: ``float32 [4, 3]``, and what else is special about it."""
    layout = "" if tensor.layout == torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    name = "" if is_plain(tensor) else f"{type(tensor).__name__} "
    return f"{name}{layout}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_savable(tensor: torch.Tensor, path: str) -> None:
    """
    Return if *tensor* has bytes that can be saved (subclasses are judged elsewhere).

    Raises:
        UnsupportedState: It has not; the message says what to do.
    """
    if is_ordinary(tensor):
        return
    if is_sharded(tensor):
        check_savable(dtensor.local(tensor), path)
        return
    for applies, reason in _OBSTACLES:
        if applies(tensor):
            raise UnsupportedState(f"cannot save {path}: {reason}", path=path)


def is_ordinary(tensor: torch.Tensor) -> bool:
    """
    Whether *tensor* is of torch's own classes, strided, and savable without looking further.

    Asked of every tensor, so it has to be quick.
    """
    return (
        is_plain(tensor)
        and tensor.layout is torch.strided
        and tensor.dtype in _BY_DTYPE
        and not tensor.is_meta
        and not tensor.is_nested
    )


def are_simple(tensors: Collection[object], *, anchored: bool = False) -> bool:
    """
    Whether all *tensors* are of the class that torch gives, ordinary, and host memory that can be copied as it is: with
    nothing to be resolved, and nothing to be noted. Asked of very many at once, in one pass.

    Args:
        tensors: Any objects.
        anchored: Whether nothing need be noted that a live tensor knows: then they may be parameters.
    """
    if not (_PLAIN if anchored else {torch.Tensor}).issuperset(map(type, tensors)):
        return False
    plain = cast("Collection[torch.Tensor]", tensors)
    return all(
        (layout, is_cpu, is_nested) == (torch.strided, True, False)
        and (anchored or not requires_grad)
        and dtype in _BY_DTYPE
        and dtype not in _WITHOUT_COPY
        for dtype, layout, is_cpu, is_nested, requires_grad in set(map(_FACTS, plain))
    ) and not (any(map(torch.Tensor.is_neg, plain)) or any(map(torch.Tensor.is_conj, plain)))


_PLAIN = frozenset({torch.Tensor, Parameter})
_FACTS = operator.attrgetter("dtype", "layout", "is_cpu", "is_nested", "requires_grad")


def _is_of(*packages: str) -> Callable[[torch.Tensor], bool]:
    """Whether a tensor's class comes from one of *packages*: asked by name, so that none has to be imported."""
    return lambda tensor: any(kind.__module__.startswith(packages) for kind in type(tensor).__mro__)


_OBSTACLES: tuple[tuple[Callable[[torch.Tensor], bool], str], ...] = (
    (is_lazy, "the lazy parameter has no shape yet. Run one batch through the module before the first save or restore"),
    (_is_of("torch._subclasses"), "a fake tensor has no data. Leave the FakeTensorMode before saving"),
    (
        lambda tensor: tensor.is_nested,
        "a nested tensor has no single shape. Save nested.unbind() as a list, or nested.to_padded_tensor(0)",
    ),
    (
        lambda tensor: tensor.is_quantized,
        "it is of a legacy quantised type. Save tensor.int_repr() with its scale and zero point",
    ),
    (lambda tensor: tensor.is_meta, "a meta tensor has no data. Materialise it first: module.to_empty(device=…)"),
    (lambda tensor: tensor.is_mkldnn, "the mkldnn layout is opaque. Save tensor.to_dense()"),
    (lambda tensor: not is_storable(tensor.dtype), "the format does not have its element type. Convert the tensor"),
)
