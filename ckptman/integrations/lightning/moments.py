"""Moments in their own dtype, which ``Optimizer.load_state_dict`` casts to that of the parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ckptman.state.optimizers import is_standard, settled


def uncast(optimizers: Sequence[Optimizer], saved: Sequence[Mapping[str, Any]]) -> None:
    """
    Put every value of *saved*, which was just loaded into *optimizers*, back as it was where loading has cast it.

    *Not* touched: optimizers whose state has a format of its own.
    """
    for optimizer, state in zip(optimizers, saved, strict=False):
        if not is_standard(state):
            continue
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state["state"] and parameter in optimizer.state:
                optimizer.state[parameter] = settled(optimizer.state[parameter], state["state"][number])
