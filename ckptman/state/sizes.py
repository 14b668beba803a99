"""How many bytes a state will have once its optimizers have made their moments: a forecast, to take memory early."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ckptman.state import modules
from ckptman.state.dtensor import is_sharded
from ckptman.state.tensors import TieKey, is_plain, tie_key


def expected_nbytes(state: Mapping[str, object], *, ranks: int = 1) -> list[int]:
    """
    Bytes of each component that has tensors: modules, optimizers and tensors. Tied ones count once. Of several ranks: a
    share.

    A forecast: an optimizer that has not stepped yet is taken to keep, for each parameter, as many moments as its
    settings suggest (Adam and its kin 2, with momentum 1). What other components hold is not counted. Calls nothing of
    the user's.
    """
    return [nbytes // ranks for nbytes in map(_expected, state.values()) if nbytes]


def _expected(live: object) -> int:
    tensors: dict[TieKey, torch.Tensor] = {}
    for tensor in _tensors(live):
        if (is_plain(tensor) and tensor.layout == torch.strided and not tensor.is_nested) or is_sharded(tensor):
            tensors[tie_key(tensor)] = tensor
    forecast = 0
    if isinstance(live, Optimizer) and not live.state:
        forecast = sum(_moments(group) for group in live.param_groups)
    return forecast + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(live: object) -> Iterator[torch.Tensor]:
    if isinstance(live, torch.nn.Module):
        yield from (entry.tensor for entry in modules.entries(live).values() if entry.tensor is not None)
    elif isinstance(live, torch.Tensor):
        yield live
    elif isinstance(live, Optimizer):
        for values in live.state.values():
            if isinstance(values, dict):
                yield from (value for value in values.values() if isinstance(value, torch.Tensor))


def _moments(group: Mapping[str, Any]) -> int:
    count = 2 if "betas" in group else 1 if group.get("momentum") else 0
    count += bool(group.get("amsgrad"))
    parameters: list[torch.Tensor] = group["params"]
    known = (p for p in parameters if p.requires_grad and (is_plain(p) or is_sharded(p)))
    return count * sum(parameter.numel() * parameter.element_size() for parameter in known)
