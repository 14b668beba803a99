"""
Restoring: where the bytes of every stored tensor are to go, and what is to be done once they are there.

Each kind of component prepares itself in three ways: it *places* its tensors, which gives targets for the reader
and callables that hand over the filled tensors; it notes differences; and it leaves steps for later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import TypeVar, cast

import numpy as np
import torch

from ckptman.errors import FormatError, StateMismatch
from ckptman.format.manifest import Tensor
from ckptman.format.values import ArrayRef, TensorRef
from ckptman.state.collecting import is_torch_dtype
from ckptman.state.differences import Differences
from ckptman.state.dtensor import is_sharded
from ckptman.state.layouts import ARRAY, SUBCLASS, Note, dress, put_together
from ckptman.state.stored import Stored, device_of
from ckptman.state.tensors import (
    TieKey,
    address,
    are_simple,
    check_savable,
    dtype_of,
    fresh,
    is_fillable,
    overwrite,
    tie_key,
)

Give = Callable[[], object]
"""Hands over a restored value. To be called once all targets are filled."""

GiveTensor = Callable[[], torch.Tensor]
Live = TypeVar("Live")

CPU = torch.device("cpu")


class Phase(IntEnum):
    """The order in which components are given back: loading one may change those that come later."""

    MODULES = 0
    OPTIMIZERS = 1
    OTHERS = 2
    RNG = 3


class Filling:
    """
    Everything that a restore will do, collected before it does anything.

    Attributes:
        members: ``id`` of a live parameter → its names in the state.
        targets: Name of a stored tensor → the tensor to be filled with its bytes.
        differences: What speaks against restoring.
        warnings: What a person should know, although it does not.
        values: The plain values, by component; complete once the steps were taken.
    """

    def __init__(self, tensors: Mapping[str, Tensor], members: Mapping[int, tuple[str, ...]]) -> None:
        self.members = members
        self.targets: dict[str, torch.Tensor] = {}
        self.differences = Differences()
        self.warnings: list[str] = []
        self.values: dict[str, object] = {}
        self._tensors = tensors
        self._steps: list[tuple[Phase, Callable[[], None]]] = []
        # which stored tensor a live one was promised to, by address: most are alone at theirs
        self._claims: dict[int, list[tuple[str, torch.Tensor]]] = {}
        # the object that is handed over for a stored tensor: a live one, or a new one
        self._objects: dict[str, torch.Tensor] = {}

    def later(self, phase: Phase, step: Callable[[], None]) -> None:
        """Take *step* once all targets are filled, with the others of its *phase* in the order of the calls."""
        self._steps.append((phase, step))

    def finish(self) -> None:
        """Take all steps."""
        for _, step in sorted(self._steps, key=lambda pair: pair[0]):
            step()

    def place(
        self, stored: Stored, ref: TensorRef, live: torch.Tensor | None, *, device: torch.device | None = None
    ) -> GiveTensor | None:
        """
        Find a target for *ref*.

        Args:
            stored: The component that it belongs to.
            ref: What is stored.
            live: What is to take the values and keep its identity; it must agree. None asks for a new tensor.
            device: Where a new tensor is to be; by default where it was, or the CPU if that is not there.

        Returns:
            What hands over the tensor; None where *live* is at the same time the place of another stored tensor
            with other bytes (never where *live* is None).
        """
        note = stored.note(ref)
        if live is not None:
            check_savable(live, ref.name)
        if note.layout == SUBCLASS:
            return self._subclass(stored, ref, live)
        if note.parts:
            return self._sparse(stored, note, live, device)
        if live is None:
            return self._new(ref.name, note, device)
        key = tie_key(live)
        holder = self._claim(ref.name, live, key)
        return None if holder is None else self._in_place(ref.name, note, live, key, holder=holder)

    def place_all(self, stored: Stored, refs: Iterable[TensorRef], live: Sequence[object]) -> bool:
        """
        Place very many, each into the tensor that is *live* in its place, if there is nothing special about any.

        Returns:
            Whether that was done. If not, nothing was, and `place` is to be asked for each.
        """
        names = [ref.name for ref in refs]
        if not are_simple(live) or len(set(names)) < len(names) or not self.targets.keys().isdisjoint(names):
            return False
        tensors = cast("Sequence[torch.Tensor]", live)
        places = list(map(torch.Tensor.data_ptr, tensors))
        if 0 in places or len(set(places)) < len(places) or not self._claims.keys().isdisjoint(places):
            return False
        if not stored.agree(names, tensors) or any(not one.is_contiguous() or one.is_inference() for one in tensors):
            return False
        self._claims.update(
            (place, [claim]) for place, claim in zip(places, zip(names, tensors, strict=True), strict=True)
        )
        self._objects.update(zip(names, tensors, strict=True))
        self.targets.update(zip(names, map(torch.Tensor.detach, tensors), strict=True))
        return True

    def place_array(self, stored: Stored, ref: ArrayRef, live: np.ndarray | None) -> Give | None:
        """Find a target for the NumPy array *ref*; as `place`."""
        note = stored.note(ref)
        if live is not None and is_torch_dtype(live.dtype) and min(live.strides, default=0) >= 0:
            view = torch.from_numpy(live)
            if is_fillable(view):
                key = tie_key(view)
                holder = self._claim(ref.name, view, key)
                if holder is None:
                    return None
                return _after(live, [self._in_place(ref.name, note, view, key, holder=holder)])
        give = self._new(ref.name, note, CPU)
        return lambda: _to_array(give(), note, live)

    def _claim(self, name: str, live: torch.Tensor, key: TieKey) -> str | None:
        """The stored tensor that fills the place of *live*: *name*, or one of the same bytes. None: neither."""
        claims = self._claims.setdefault(address(live), [])
        holder = next((holder for holder, other in claims if tie_key(other) == key), None)
        if holder is None:
            claims.append((name, live))
            return name
        return holder if holder == name or _same_bytes(self._tensors[holder], self._tensors[name]) else None

    def _new(self, name: str, note: Note, device: torch.device | None) -> GiveTensor:
        if name not in self.targets:
            self._target(name, note, None, device)
        given = self._objects[name]
        return lambda: given

    def _in_place(self, name: str, note: Note, live: torch.Tensor, key: TieKey, *, holder: str) -> GiveTensor:
        if holder != name:
            return lambda: live  # filled as the one that claimed it, whose bytes are the same
        if name not in self.targets:
            self._target(name, note, live, None)
        target, given = self.targets[name], self._objects[name]
        if given is live or tie_key(given) == key:
            return lambda: live

        def give() -> torch.Tensor:
            overwrite(live, target)
            return live

        return give

    def _target(self, name: str, note: Note, live: torch.Tensor | None, device: torch.device | None) -> None:
        if live is not None and is_fillable(live):
            self.targets[name] = live if is_sharded(live) else live.detach()
            self._objects[name] = live
            return
        stored = self._tensors[name]
        where = (device or _available(note.device)) if live is None else live.device
        target = fresh(dtype_of(stored.dtype), stored.shape, device=where, like=live)
        self.targets[name] = target if is_sharded(target) else target.detach()
        self._objects[name] = dress(target, note)

    def _subclass(self, stored: Stored, ref: TensorRef, live: torch.Tensor | None) -> GiveTensor | None:
        if live is None:
            raise FormatError(f"{ref.name!r} is of a tensor subclass, in a place where none can be made")
        parts = stored.note(ref).parts
        gives = [self.place(stored, TensorRef(name), getattr(live, part)) for part, name in parts.items()]
        whole = [give for give in gives if give is not None]
        return _after(live, whole) if len(whole) == len(gives) else None

    def _sparse(self, stored: Stored, note: Note, live: torch.Tensor | None, device: torch.device | None) -> GiveTensor:
        where = device or (_available(note.device) if live is None else live.device)
        parts = {part: self._new(name, stored.note(TensorRef(name)), where) for part, name in note.parts.items()}

        def give() -> torch.Tensor:
            whole = put_together(note, {part: given() for part, given in parts.items()})
            if live is None:
                return dress(whole, note)
            overwrite(live, whole)
            return live

        return give


def _after(live: Live, gives: list[GiveTensor]) -> Callable[[], Live]:
    """Hand over *live*, once its parts were handed over."""

    def give() -> Live:
        for part in gives:
            part()
        return live

    return give


def _to_array(tensor: torch.Tensor, note: Note, live: np.ndarray | None) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    if note.layout == ARRAY:
        array = array.view(note.facts["dtype"]).reshape(note.shape)
    if live is None:
        return array
    np.copyto(live, array)
    return live


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two stored tensors are known to be equal: by their digests, chunk by chunk."""
    if one is other:
        return True

    def content(tensor: Tensor) -> list[object]:
        return [(chunk.offset, chunk.shape, chunk.digests) for chunk in tensor.chunks]

    return (one.dtype, one.shape, content(one)) == (other.dtype, other.shape, content(other))


def _available(name: str | None) -> torch.device:
    """The device *name* where this machine has it, another of its type where it has that, else the CPU."""
    device = CPU if name is None else device_of(name)
    module = getattr(torch, device.type, None)
    if device.type == "cpu" or module is None or not module.is_available():
        return CPU
    return device if (device.index or 0) < module.device_count() else torch.device(device.type)


def give_back(component: str, load: Callable[[], object]) -> None:
    """
    Call *load*, which hands a state to an object of the user or of torch.

    Raises:
        StateMismatch: It refused. Other live objects may have been restored already.
    """
    try:
        load()
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise StateMismatch(
            f"{component}: its load_state_dict refused what was saved ({type(error).__name__}: {error}). "
            "The live state is now partly restored: do not train on with it",
            differences=[f"{component}: {error}"],
        ) from error
