"""
DTensors: which box of the whole tensor this process holds. The only room that knows torch's private parts of them.

FSDP2 (1-D, HSDP, together with tensor parallelism) makes parameters and moments DTensors. Each process holds one box
of each: perhaps an empty one, and not in the order of the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ckptman.errors import UnsupportedState
from ckptman.state import flat
from ckptman.state.flat import FlatShard

_FSDP2 = "torch.distributed.fsdp._fully_shard"


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part begins in the whole, and its shape."""


class Shard(NamedTuple):
    """A box of a tensor: where it begins, and its values, which share memory with the whole's."""

    offset: tuple[int, ...]
    tensor: torch.Tensor


def is_sharded(tensor: object) -> bool:
    """Whether *tensor* is a DTensor, or stands for what FSDP1 holds a range of."""
    if type(tensor) is FlatShard:
        return True
    # where the module was never imported, which takes long, there is none
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of *tensor*, detached; of a plain tensor the tensor itself, detached."""
    if not is_sharded(tensor):
        return tensor.detach()
    if type(tensor) is FlatShard:
        return tensor.part
    with torch.no_grad():  # detaching the DTensor itself takes a hundred times as long
        found: torch.Tensor = _as_any(tensor).to_local().detach()
    return found


def shards(tensor: torch.Tensor, path: str = "the tensor") -> list[Shard]:
    """
    What this process holds of *tensor*: all of a plain one, a box of a DTensor, nothing where it is outside the mesh,
    some boxes of one of FSDP1.

    Raises:
        UnsupportedState: What it holds is not a box: a partial sum, or torch will not say where it belongs.
    """
    if not is_sharded(tensor):
        return [Shard((0,) * tensor.dim(), tensor.detach())]
    if type(tensor) is FlatShard:
        if not tensor.numel():
            return [Shard((0,) * tensor.dim(), tensor.part.view(tensor.shape))]
        held = flat.ranges(tuple(tensor.shape), tensor.start, tensor.start + tensor.part.numel())
        return [Shard(offset, tensor.part[at:end].view(extent)) for offset, extent, at, end in held]
    part, whole = local(tensor), _as_any(tensor)
    coordinate = whole.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    # placements are compared as text: some versions of torch take two different ones for equal
    facts = whole.device_mesh, tuple(coordinate), repr(whole.placements), tuple(whole.shape)
    try:
        offset, extent = _known(facts) or _learnt(facts, _box(whole))
    except (RuntimeError, ValueError) as error:
        raise UnsupportedState(f"cannot save {path}: {error}. Redistribute it first", path=path) from error
    if extent != tuple(part.shape):
        raise UnsupportedState(
            f"cannot save {path}: its placements {whole.placements} leave this process {list(part.shape)}, which is no "
            "single box of the whole. Redistribute it first",
            path=path,
        )
    return [Shard(offset, part)]


_BOXES: dict[object, Box] = {}  # torch takes long to say it, and says the same for all tensors of one shape
_MAX_BOXES = 10_000


def _known(facts: object) -> Box | None:
    return _BOXES.get(facts)


def _learnt(facts: object, box: Box) -> Box:
    if len(_BOXES) >= _MAX_BOXES:
        _BOXES.clear()
    _BOXES[facts] = box
    return box


def _box(whole: Any) -> Box:
    if hasattr(whole, "__create_chunk_list__"):
        chunks = whole.__create_chunk_list__()
        if len(chunks) != 1:
            raise RuntimeError(f"it is {len(chunks)} boxes in one process")
        return tuple(chunks[0].offsets), tuple(chunks[0].sizes)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    extent, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
    return tuple(offset), tuple(extent)


def like(model: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised DTensor, spread as *model* is. Communicates with nobody."""
    if type(model) is FlatShard:
        return flat.like(model, dtype)
    from torch.distributed.tensor import DTensor

    whole = _as_any(model)
    made: torch.Tensor = DTensor.from_local(
        torch.empty_like(local(model), dtype=dtype),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return made


def overwrite(live: torch.Tensor, source: torch.Tensor) -> None:
    """
    Give the DTensor *live* the values of *source*: a plain tensor of the whole shape, or one that is spread as it is.

    Raises:
        UnsupportedState: *source* is spread otherwise.
    """
    given, held = shards(source), shards(live)
    if is_sharded(source) and _boxes(given) != _boxes(held):
        raise UnsupportedState("one stored tensor belongs to two live ones that are spread differently")
    for number, shard in enumerate(held):
        extent = tuple(shard.tensor.shape)
        if is_sharded(source):
            shard.tensor.copy_(given[number].tensor)
        else:
            index = tuple(slice(start, start + size) for start, size in zip(shard.offset, extent, strict=True))
            shard.tensor.copy_(given[0].tensor[index])


def _boxes(held: list[Shard]) -> list[Box]:
    return [(shard.offset, tuple(shard.tensor.shape)) for shard in held]


def settle(state: Mapping[str, object]) -> None:
    """
    Have FSDP let go of whole parameters that it keeps for the next backward pass: what modules hold is sharded then.

    Nothing that training computes is changed by it: they are gathered again when they are needed.

    Raises:
        UnsupportedState: A module is sharded by FSDP1 without ``use_orig_params``.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    first, second = module.FullyShardedDataParallel, getattr(module, "FSDPModule", ())
    for name, live in state.items():
        for part in live.modules() if isinstance(live, nn.Module) else ():
            if isinstance(part, first):
                flat.settle(name, part)
            if isinstance(part, second):
                part.reshard()


def is_of_fsdp2(hook: object) -> bool:
    """Whether *hook* of a module is one of FSDP2's, which do no more than `settle` does."""
    inner = getattr(hook, "hook", hook)  # load hooks are wrapped
    return getattr(inner, "__module__", "").startswith(_FSDP2)


def _as_any(tensor: torch.Tensor) -> Any:
    return tensor
