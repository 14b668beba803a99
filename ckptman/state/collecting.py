"""Capturing one component: its tensors become leaves, the rest typed values that refer to them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import cast

import msgspec
import numpy as np
import torch
from torch.nn.parameter import Parameter

from ckptman.errors import UnsupportedState
from ckptman.format.numpy_values import is_inline, numpy_tree
from ckptman.format.values import ArrayRef, Marker, TensorRef, TorchDevice, TorchDtype, TorchSize, to_json
from ckptman.state.dtensor import is_sharded, shards
from ckptman.state.layouts import ARRAY, STRIDED, Note, Parts, refused_subclass, take_apart, take_subclass_apart
from ckptman.state.tensors import (
    address,
    are_simple,
    check_savable,
    dtype_name,
    is_ordinary,
    is_plain,
    is_storable,
    plain_view,
    tie_key,
)

_MANY = 64
"""Tensors of one dict, from which on it pays to take them at once."""

_KEY = "key"
_SPECIAL = re.compile(r"""['"\[\]]""")
_SUBSCRIPT = re.compile(r"""\[(?:'([^']*)'|"([^"]*)"|([^\]]*))\]""")


class Leaf(msgspec.Struct, frozen=True, kw_only=True):
    """
    One tensor of a checkpoint, or what this process holds of it.

    Attributes:
        name: ``<component>/<name inside>``, unique in the checkpoint.
        tensor: Detached and strided, without conjugate or negative bit; on any device; perhaps not contiguous. It
            shares the memory of the live object where there is one, so it changes when training goes on.
        offset, shape: Where ``tensor`` lies in the whole, and the shape of that; None for all but DTensors.
        is_parameter: Whether ranks that hold all of it are meant to hold the same: a parameter, or a DTensor.
    """

    name: str
    tensor: torch.Tensor
    offset: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    is_parameter: bool = False


class Collector:
    """
    Takes the tensors out of one component.

    A tensor met twice (tied weights) is stored once; its other names are ``aliases``.

    Attributes:
        component: The name of the component: the prefix of its tensors and the beginning of every path.
        members: ``id`` of a parameter → its names in the state, for optimizers.
        leaves, aliases: What was collected.
    """

    def __init__(self, component: str, members: Mapping[int, tuple[str, ...]]) -> None:
        self.component = component
        self.members = members
        self.leaves: list[Leaf] = []
        self.aliases: dict[str, str] = {}
        self._notes: dict[str, Note] = {}
        self._taken: set[str] = set()
        # by address, under which most tensors are alone; they are kept, for it stays theirs only while they live
        self._seen: dict[int, _Met] = {}
        self._neighbours: defaultdict[int, list[_Met]] = defaultdict(list)  # further ones at the same address

    def document(self, tree: object) -> bytes:
        """
        Encode *tree*, the component's state, taking out the tensors that are still in it.

        Raises:
            UnsupportedState: Something in it cannot be saved; the path says what.
        """
        state = to_json(tree, self.component, self._extract, extract_all=self._extract_all)
        if not self._notes:
            return b'{"state":%s}' % state
        notes = {name: note.to_tree() for name, note in self._notes.items()}
        return b'{"state":%s,"notes":%s}' % (state, to_json(notes, f"{self.component} (metadata)", self._extract))

    def tensor(self, name: str, tensor: torch.Tensor, path: str, *, anchored: bool = False) -> TensorRef:
        """
        Take *tensor* under the *name* (without the component), or under the one that it has already.

        Args:
            name: Made unique by a suffix if it is taken.
            tensor: Strided or sparse.
            path: Where it is in the state, for messages.
            anchored: Whether the live tensor will be there on restore, so that a subclass may be taken apart, and
                nothing need be noted that the live one knows.

        Raises:
            UnsupportedState: It is of a kind that cannot be saved.
        """
        if is_ordinary(tensor):
            return self._strided(name, tensor, anchored=anchored)
        check_savable(tensor, path)
        if not is_plain(tensor):
            if is_sharded(tensor):
                return self._sharded(name, tensor, path)
            if not anchored:
                raise refused_subclass(tensor, path)
            return self._parts(self._unique(name), take_subclass_apart(tensor, path), tensor, path, anchored=anchored)
        if tensor.layout != torch.strided:
            return self._parts(self._unique(name), take_apart(tensor), tensor, path, anchored=anchored)
        return self._strided(name, tensor, anchored=anchored)

    def take_all(
        self, names: Collection[str], tensors: Collection[object], *, anchored: bool = False
    ) -> list[str] | None:
        """
        Take *tensors* under *names*, as ``tensor`` would take each, if there is nothing special about any of them.

        What is asked of a tensor is asked of all of them in one pass.

        Returns:
            Their full names; None where one is special, tied, empty, or no tensor: then nothing was taken.
        """
        full = [f"{self.component}/{name}" for name in names]
        if not are_simple(tensors, anchored=anchored) or len(set(full)) < len(full) or not self._taken.isdisjoint(full):
            return None
        simple = cast("list[torch.Tensor]", list(tensors))
        places = list(map(torch.Tensor.data_ptr, simple))
        if 0 in places or len(set(places)) < len(places) or not self._seen.keys().isdisjoint(places):
            return None
        self._taken.update(full)
        self._seen.update(zip(places, zip(map(TensorRef, full), simple, strict=True), strict=True))
        self.leaves += [
            Leaf(name=name, tensor=tensor.detach(), is_parameter=type(tensor) is Parameter)
            for name, tensor in zip(full, simple, strict=True)
        ]
        return full

    def _strided(self, name: str, tensor: torch.Tensor, *, anchored: bool) -> TensorRef:
        full = self._unique(name)
        ref = self._met(full, tensor)
        if ref.name != full:
            return ref
        self.leaves.append(Leaf(name=full, tensor=plain_view(tensor), is_parameter=type(tensor) is Parameter))
        if not anchored and (tensor.requires_grad or type(tensor) is not torch.Tensor or not tensor.is_cpu):
            self._note(full, tensor, _WHOLE, {})
        return ref

    def _met(self, full: str, tensor: torch.Tensor) -> TensorRef:
        """The reference to *tensor*: under the name that it has already where it was met before, else under *full*."""
        place, fresh = address(tensor), (TensorRef(full), tensor)
        first = self._seen.setdefault(place, fresh)
        if first is fresh:
            return fresh[0]
        for ref, other in (first, *self._neighbours[place]):
            if _is_one(tensor, other):
                self.aliases[full] = ref.name
                return ref
        self._neighbours[place].append(fresh)
        return fresh[0]

    def _sharded(self, name: str, tensor: torch.Tensor, path: str) -> TensorRef:
        full = self._unique(name)
        ref = self._met(full, tensor)
        if ref.name != full:
            return ref
        for offset, held in shards(tensor, path):
            if not is_plain(held):
                raise refused_subclass(held, path)
            self.leaves.append(
                Leaf(name=full, tensor=plain_view(held), offset=offset, shape=tuple(tensor.shape), is_parameter=True)
            )
        return ref

    def _parts(self, full: str, parts: Parts, tensor: torch.Tensor, path: str, *, anchored: bool) -> TensorRef:
        inner = full.removeprefix(f"{self.component}/")
        refs = {
            part: self.tensor(f"{inner}/{part}", value, f"{path}.{part}", anchored=anchored)
            for part, value in parts.tensors.items()
        }
        self._note(full, tensor, parts, {part: ref.name for part, ref in refs.items()})
        return TensorRef(full)

    def _note(self, full: str, tensor: torch.Tensor, parts: Parts, names: dict[str, str]) -> None:
        note = Note(
            layout=parts.layout,
            shape=tuple(tensor.shape) if names else (),
            parts=names,
            facts=parts.facts,
            device=None if tensor.device.type == "cpu" else str(tensor.device),
            requires_grad=tensor.requires_grad,
            parameter=isinstance(tensor, Parameter),
        )
        if note.to_tree():
            self._notes[full] = note

    def _array(self, name: str, array: np.ndarray) -> ArrayRef:
        plain = np.ascontiguousarray(array).reshape(array.shape)
        if not plain.flags.writeable:
            plain = plain.copy()  # torch would warn of it
        full = self._unique(name)
        if is_torch_dtype(plain.dtype):
            self.leaves.append(Leaf(name=full, tensor=torch.from_numpy(plain)))
        else:
            self.leaves.append(Leaf(name=full, tensor=torch.from_numpy(plain.reshape(-1).view(np.uint8))))
            self._notes[full] = Note(layout=ARRAY, shape=plain.shape, facts={"dtype": plain.dtype})
        return ArrayRef(full)

    def _extract(self, value: object, path: str) -> Marker | None:
        if isinstance(value, TensorRef):
            return value  # taken already
        if isinstance(value, torch.Tensor):
            return self.tensor(self._name_of(path), value, path)
        if type(value) is np.ndarray and numpy_tree(value.dtype) is not None and not is_inline(value):
            return self._array(self._name_of(path), value)
        if isinstance(value, _LIVING) or (hasattr(value, "load_state_dict") and not isinstance(value, type)):
            raise _not_inside(value, path)
        return _small_marker(value)

    def _extract_all(self, values: Mapping[str, object], path: str) -> list[str] | None:
        """
        Take all *values*, as `_extract` would take each, if they are very many and there is nothing special about any.

        What is asked of a tensor is asked of all of them in one pass, and what it is called is found out once.
        """
        if len(values) < _MANY:
            return None
        stem = self._stem(values, path)
        return None if stem is None else self.take_all([f"{stem}{key}" for key in values], values.values())

    def _stem(self, keys: Collection[str], path: str) -> str | None:
        """What comes before each of *keys* in the name of what lies under it; None where `_name_of` does more to it."""
        every = "".join(keys)
        if not is_shown_as_it_is(every):
            return None
        stem = self._name_of(f"{path}['{_KEY}']").removesuffix(_KEY)
        if stem or ("." not in every and "" not in keys):
            return stem
        is_changed = any(key.startswith((".", "entries.", "state.")) or not key for key in keys)
        return None if is_changed else stem

    def _name_of(self, path: str) -> str:
        """A name for the tensor at *path*: ``ema['w'][0]`` gives ``w.0``."""
        inner = path.removeprefix(self.component)
        plain = inner[2:-2].replace("']['", ".")  # right where it has keys of plain text only, as most have
        if inner[:2] != "['" or inner[-2:] != "']" or _SPECIAL.search(plain):
            plain = _SUBSCRIPT.sub(r".\1\2\3", inner)
        inner = plain.lstrip(".")
        return inner.removeprefix("entries.").removeprefix("state.") or "value"

    def _unique(self, name: str) -> str:
        full = stem = f"{self.component}/{name}"
        count = 1
        while full in self._taken:
            count += 1
            full = f"{stem}~{count}"
        self._taken.add(full)
        return full


def is_shown_as_it_is(keys: str) -> bool:
    """Whether *keys*, one behind the other, stand in a path, and in the name of a tensor, as they are."""
    return not _SPECIAL.search(keys) and "\\" not in keys and keys.isprintable()


_Met = tuple[TensorRef, torch.Tensor]
"""A tensor, and what refers to it."""


def _is_one(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two live tensors are tied, and alike for the user too."""
    is_alike = type(tensor) is type(other) and tensor.requires_grad == other.requires_grad
    return is_alike and tie_key(tensor) == tie_key(other)


_WHOLE = Parts(layout=STRIDED, tensors={})


def _small_marker(value: object) -> Marker | None:
    if isinstance(value, torch.dtype) and is_storable(value):
        return TorchDtype(dtype_name(value))
    if isinstance(value, torch.device):
        return TorchDevice(str(value))
    return TorchSize(tuple(value)) if isinstance(value, torch.Size) else None


_LIVING = (torch.Generator, np.random.Generator, np.random.RandomState)


def _not_inside(value: object, path: str) -> UnsupportedState:
    kind = type(value).__name__
    return UnsupportedState(
        f"cannot save {path}: a {kind} can be saved as a component of its own, not within another: put it into the "
        f"state under a name, as in {{'{kind.lower()}': …}}",
        path=path,
    )


def is_torch_dtype(dtype: np.dtype) -> bool:
    """Whether a NumPy array of *dtype* can be seen as a tensor without touching its bytes."""
    return dtype in _SHARED


# np.dtype compares byte orders too
_SHARED = frozenset(np.dtype(code) for code in "?bBhHiIlLqQefdFD")
