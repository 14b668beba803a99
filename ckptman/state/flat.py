"""
FSDP1 (``FullyShardedDataParallel``): parameters of which this process holds a range of elements. The only room that
knows torch's private parts of them.

FSDP1 flattens the parameters of a module into one, and cuts that among the ranks without regard to rows. So what a
process holds of a parameter is a range of its elements in row-major order: no box, but a few of them. They are saved
and filled where they lie; FSDP1's own ``state_dict``, which gathers the parameters of one module after the other, is
never called. With ``use_orig_params=True`` optimizers keep the moments of the same range.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ckptman.errors import UnsupportedState

WRAPPED = "_fsdp_wrapped_module"
"""Where FSDP1 keeps the module that it wraps."""

Range = tuple[tuple[int, ...], tuple[int, ...], int, int]
"""A box, as its offset and shape, and where its elements begin and end within what is held."""


class FlatShard(torch.Tensor):
    """
    A tensor of which this process holds a range of elements. Has a shape and a dtype; nothing can be computed with it.

    Attributes:
        part: The elements, one after the other; shares memory with the live parameter or moment.
        start: The number of the first one in the whole.
    """

    part: torch.Tensor
    start: int

    @staticmethod
    def __new__(cls, part: torch.Tensor, start: int, shape: tuple[int, ...]) -> FlatShard:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=part.dtype, device=part.device)
        assert isinstance(made, FlatShard)
        made.part, made.start = part, start
        return made

    def __init__(self, *_: object) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, function: object, *_: object) -> Any:
        raise NotImplementedError(f"{function} of a part of a flattened parameter")


_KNOWN: MutableMapping[torch.Tensor, FlatShard] = WeakIdKeyDictionary()  # by parameter; anew by each `settle`


def wrapper() -> type[nn.Module] | None:
    """FSDP1's class of modules; None where nobody has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return None if fsdp is None else fsdp.FullyShardedDataParallel


def is_wrapper(module: nn.Module) -> bool:
    """Whether *module* is FSDP1's."""
    known = wrapper()
    return known is not None and isinstance(module, known)


def settle(name: str, module: nn.Module) -> None:
    """
    Have the FSDP1 *module* of the component *name* let go of whole parameters, and find out what is held of each.

    Raises:
        UnsupportedState: It was made without ``use_orig_params``.
    """
    handle = getattr(module, "_handle", None)
    if handle is None or not handle.uses_sharded_strategy:
        return  # it manages no parameters, or holds all of them: plain ones
    if not handle._use_orig_params:
        raise UnsupportedState(
            f"cannot save {name}: FullyShardedDataParallel (FSDP1) without use_orig_params=True hides the parameters "
            "from the optimizer, whose moments then have no names. Give it use_orig_params=True, or use fully_shard",
            path=name,
        )
    flat = handle.flat_param
    # after an evaluation the outermost one keeps whole parameters beside the parts, and would compute with them on
    if hasattr(flat, "_full_param_padded") and not handle.needs_unshard():
        from torch.distributed.fsdp._runtime_utils import _reshard

        _reshard(module, handle, True)
    for parameter, shard, shape in zip(flat._params, flat._shard_param_infos, flat._shapes, strict=True):
        start = shard.intra_param_start_idx if shard.in_shard else 0
        _KNOWN[parameter] = FlatShard(parameter.detach(), start, tuple(shape))


def is_in_use() -> bool:
    """Whether a parameter may be one of FSDP1's: else `whole` and `beside` give back what they are given."""
    return len(_KNOWN) > 0


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """What *parameter* is a range of, where it is one of FSDP1's; else itself."""
    return _KNOWN.get(parameter, parameter) if is_in_use() else parameter


def is_nothing(parameter: torch.Tensor) -> bool:
    """Whether *parameter* is one of FSDP1's of which nothing is held: an optimizer keeps no state of it."""
    known = whole(parameter)
    return type(known) is FlatShard and not known.part.numel()


def beside(parameter: torch.Tensor, value: Any) -> Any:
    """*value*, from the state of *parameter*, as what it is a range of, where it has a number for each element."""
    known = whole(parameter)
    if type(known) is not FlatShard or not isinstance(value, torch.Tensor) or value.shape != known.part.shape:
        return value
    return FlatShard(value.detach(), known.start, tuple(known.shape))


def held(value: Any) -> Any:
    """*value* with the elements themselves for every `FlatShard` within: as an optimizer keeps it."""
    if type(value) is dict:
        return {key: held(one) for key, one in value.items()}
    return value.part if type(value) is FlatShard else value


def like(model: FlatShard, dtype: torch.dtype) -> FlatShard:
    """An uninitialised one, of which the same is held as of *model*."""
    return FlatShard(torch.empty_like(model.part, dtype=dtype), model.start, tuple(model.shape))


def ranges(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Range]:
    """
    The boxes that elements *start* to *stop* of a tensor of *shape* make up, in their order: 2 * ndim - 1 at most.

    A part of a row, whole rows, and a part of a row; where a row is itself of several dimensions, its part likewise.
    """
    return _ranges(shape, start, stop, 0)


def _ranges(shape: tuple[int, ...], start: int, stop: int, at: int) -> Iterator[Range]:
    if start >= stop:
        return
    if not shape:
        yield (), (), at, at + 1
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # all of it within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row, at)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row, at) if start % row else ()
    at += first * row - start
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), at, at + (last - first) * row
    at += (last - first) * row
    yield from _in_row(shape, last, 0, stop - last * row, at)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int, at: int) -> Iterator[Range]:
    for offset, extent, begin, end in _ranges(shape[1:], start, stop, at):
        yield (row, *offset), (1, *extent), begin, end
