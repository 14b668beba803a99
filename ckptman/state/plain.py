"""Components that are data themselves: tensors, arrays, containers, values; and objects with a ``state_dict``."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from ckptman.format.values import ArrayRef, TensorRef
from ckptman.state.collecting import Collector
from ckptman.state.filling import Filling, Give, Phase, give_back
from ckptman.state.stored import Stored
from ckptman.state.tensors import check_savable, describe
from ckptman.state.trees import give_tree, same_type


class Stateful(Protocol):
    """What torch, torchdata and many others agree on."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def capture_tensor(live: torch.Tensor, collector: Collector) -> TensorRef:
    """A tensor."""
    return collector.tensor("value", live, collector.component, anchored=True)


def prepare_tensor(live: torch.Tensor, stored: Stored, filling: Filling) -> None:
    """Fill the live tensor in place."""
    check_savable(live, stored.name)
    ref = stored.tree
    if not isinstance(ref, TensorRef) or not stored.agrees(ref, live):
        found = stored.describe(ref) if isinstance(ref, TensorRef) else "no tensor"
        filling.differences.resized(stored.name, live=describe(live), checkpoint=found)
        return
    give = filling.place(stored, ref, live)
    if give is None:
        filling.differences.fatal(
            stored.name, live="a tensor tied to another one of the state", checkpoint="other values for each of the two"
        )
        return
    _take_later(give, filling)


def capture_array(live: np.ndarray, collector: Collector) -> np.ndarray:
    """A NumPy array: small ones are kept in the values, others as tensors."""
    return live


def prepare_array(live: np.ndarray, stored: Stored, filling: Filling) -> None:
    """Fill the live array in place."""
    saved = stored.tree
    dtype, shape = stored.array_type(saved) if isinstance(saved, ArrayRef) else _array_type(saved)
    if live.dtype != dtype or live.shape != shape or not live.flags.writeable:
        writable = "" if live.flags.writeable else "read-only "
        filling.differences.resized(
            stored.name, live=f"a {writable}{live.dtype} {list(live.shape)}", checkpoint=f"{dtype} {list(shape)}"
        )
        return
    _take_later(give_tree(live, saved, stored, filling), filling)


def _array_type(saved: object) -> tuple[np.dtype | None, tuple[int, ...]]:
    return (saved.dtype, saved.shape) if isinstance(saved, np.ndarray) else (None, ())


def capture_whole(live: object, collector: Collector) -> object:
    """A container or a plain value: it is its own tree."""
    return live


def prepare_container(live: object, stored: Stored, filling: Filling) -> None:
    """Refill a dict, list, deque or set in place, whatever it holds now."""
    if not same_type(live, stored.tree):
        filling.differences.fatal(
            stored.name, live=f"a {type(live).__name__}", checkpoint=f"a {type(stored.tree).__name__}"
        )
        return
    _take_later(give_tree(live, stored.tree, stored, filling), filling)


def prepare_value(live: object, stored: Stored, filling: Filling) -> None:
    """Hand the saved value over; the live one is only an example."""
    give = give_tree(None, stored.tree, stored, filling)
    filling.later(Phase.OTHERS, lambda: filling.values.update({stored.name: give()}))


def capture_stateful(live: Stateful, collector: Collector) -> object:
    """Whatever its ``state_dict`` gives."""
    return live.state_dict()


def prepare_stateful(live: Stateful, stored: Stored, filling: Filling) -> None:
    """Hand the saved state to ``load_state_dict``, which alone can judge it."""
    if isinstance(live, torch.amp.GradScaler) and live.is_enabled() and not stored.tree:
        filling.differences.fatal(stored.name, live="an enabled GradScaler", checkpoint="a disabled one")
        return
    give = give_tree(None, stored.tree, stored, filling)

    def step() -> None:
        state = give()
        give_back(stored.name, lambda: live.load_state_dict(state))

    filling.later(Phase.OTHERS, step)


def _take_later(give: Give, filling: Filling) -> None:
    def step() -> None:
        give()

    filling.later(Phase.OTHERS, step)
