"""
Trees of plain values: dicts, lists and what may be in them.

A dict, list, deque or set of the live state keeps its identity, at any depth, where the checkpoint has one of the same
type in the same place; so does a tensor or array where dtype and shape agree. Anything else is replaced.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from ckptman.format.values import ArrayRef, Marker, TensorRef, TorchDtype, to_json
from ckptman.state.filling import Filling, Give
from ckptman.state.stored import Stored

CONTAINERS: tuple[type, ...] = (dict, OrderedDict, Counter, list, deque, set)
"""What can be restored in place, by exact type."""

_MANY = 64
"""Tensors of one dict, from which on it pays to place them at once."""


def give_tree(
    live: object, saved: object, stored: Stored, filling: Filling, *, device: torch.device | None = None
) -> Give:
    """
    Place all tensors of the tree *saved*.

    Args:
        live: What is in its place now and may take the values in place; None to make everything anew.
        saved: A part of the tree of *stored*.
        stored: The component.
        filling: Where targets are collected.
        device: Where new tensors are to be; by default where they were.

    Returns:
        What hands over the tree: *live* itself, refilled, where that is possible.
    """
    return _Placing(stored, filling, device).tree(live, saved)


class _Placing:
    """One walk over a saved tree and, as far as it goes, the live one beside it."""

    def __init__(self, stored: Stored, filling: Filling, device: torch.device | None) -> None:
        self.stored = stored
        self.filling = filling
        self.device = device
        # id of a live container → what it is to hold, and itself, so that the id stays its own
        self._claims: dict[int, tuple[object, object]] = {}

    def tree(self, live: object, saved: object) -> Give:
        if isinstance(saved, TensorRef):
            return self._tensor(live, saved)
        if isinstance(saved, ArrayRef):
            return self._array(live, saved)
        if isinstance(saved, np.ndarray):
            return _small_array(live, saved)
        place = _PLACES.get(type(saved))
        if place is None:
            return lambda: saved
        return place(self, live if self._can_hold(live, saved) else None, saved)

    def _can_hold(self, live: object, saved: object) -> bool:
        if not same_type(live, saved):
            return False
        if type(live) not in CONTAINERS:
            return True
        # a live container in two places can hold only one of two contents
        content, _ = self._claims.setdefault(id(live), (saved, live))
        return content is saved or _encoded(content) == _encoded(saved)

    def _tensor(self, live: object, ref: TensorRef) -> Give:
        if isinstance(live, torch.Tensor) and self.stored.agrees(ref, live):
            give = self.filling.place(self.stored, ref, live)
            if give is not None:
                return give
        return cast(Give, self.filling.place(self.stored, ref, None, device=self.device))

    def _array(self, live: object, ref: ArrayRef) -> Give:
        if type(live) is np.ndarray and self.stored.array_agrees(ref, live):
            give = self.filling.place_array(self.stored, ref, live)
            if give is not None:
                return give
        return cast(Give, self.filling.place_array(self.stored, ref, None))

    def items(self, live: Any, saved: Any) -> list[Give]:
        old = list(live) if isinstance(live, list | tuple | deque) else []
        return [self.tree(old[index] if index < len(old) else None, item) for index, item in enumerate(saved)]

    def dict(self, live: Any, saved: Any) -> Give:
        old = {} if live is None else live
        placed = self._placed(old, saved)
        gives = {key: self.tree(old.get(key), value) for key, value in saved.items()} if placed is None else {}

        def give() -> object:
            target = type(saved)() if live is None else live
            items = {key: given() for key, given in gives.items()} if placed is None else placed
            target.clear()
            for key, value in items.items():  # not update: a Counter's adds
                target[key] = value
            return target

        return give

    def _placed(self, old: Any, saved: Any) -> Any:
        """The live tensors of a dict by key, if it has very many, nothing else, and all are filled where they are."""
        if len(saved) < _MANY or not {TensorRef}.issuperset(map(type, saved.values())):
            return None
        lives = {key: old.get(key) for key in saved}
        return lives if self.filling.place_all(self.stored, saved.values(), list(lives.values())) else None

    def list(self, live: Any, saved: Any) -> Give:
        gives = self.items(live, saved)

        def give() -> object:
            items = [given() for given in gives]
            if live is None:
                return deque(items, saved.maxlen) if type(saved) is deque else items
            live.clear()
            live.extend(items)
            return live

        return give

    def set(self, live: Any, saved: Any) -> Give:
        gives = self.items(None, saved)

        def give() -> object:
            items = {given() for given in gives}
            if live is None:
                return items
            live.clear()
            live.update(items)
            return live

        return give

    def fixed(self, live: Any, saved: Any) -> Give:
        gives = self.items(live, saved)
        return lambda: type(saved)(given() for given in gives)


_PLACES: dict[type, Callable[[_Placing, Any, Any], Give]] = {
    dict: _Placing.dict,
    OrderedDict: _Placing.dict,
    Counter: _Placing.dict,
    list: _Placing.list,
    deque: _Placing.list,
    set: _Placing.set,
    tuple: _Placing.fixed,
    frozenset: _Placing.fixed,
}


def same_type(live: object, saved: object) -> bool:
    """Whether the two are of exactly the same type, and of the same ``maxlen`` if they are deques."""
    return type(live) is type(saved) and getattr(live, "maxlen", None) == getattr(saved, "maxlen", None)


def _small_array(live: object, saved: np.ndarray) -> Give:
    fits = type(live) is np.ndarray and live.dtype == saved.dtype and live.shape == saved.shape and live.flags.writeable
    if not fits:
        return lambda: saved

    def give() -> object:
        np.copyto(cast(np.ndarray, live), saved)
        return live

    return give


def _encoded(tree: object) -> bytes:
    def name(value: object, _: str) -> Marker | None:
        if isinstance(value, TensorRef | ArrayRef):
            return value
        return TorchDtype(repr(value)) if isinstance(value, torch.dtype | torch.device | torch.Size) else None

    return to_json(tree, "", name)
