"""What a foreign format gives: components of plain values, in which tensors are promises of bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

from ckptman.convert.files import Bytes
from ckptman.errors import FormatError
from ckptman.format.dtypes import DTYPES


@dataclass(frozen=True, slots=True, eq=False)
class ForeignTensor:
    """
    A tensor of a foreign file, not read yet.

    Attributes:
        dtype: Torch's name of it.
        shape: Of the whole.
        data: Its bytes, row-major.
        tie: Equal for two that are one tensor of the file; None where the file cannot say.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Bytes
    tie: object = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise FormatError(f"tensors of {self.dtype!r} are not known to the format")
        if math.prod(self.shape) * DTYPES[self.dtype].itemsize != self.data.nbytes:
            raise FormatError(f"a tensor {self.dtype} {list(self.shape)} cannot have {self.data.nbytes} bytes")


@dataclass(frozen=True, slots=True)
class Document:
    """A component in our own encoding: ``values`` is typed JSON that refers to *tensors* by their full names."""

    values: bytes
    tensors: Mapping[str, ForeignTensor]
    aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Part:
    """One component: how it is to be given back (a name of ``state/kinds.py``), and its tree as that kind has it."""

    kind: str
    tree: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """
    What was found at a place.

    Attributes:
        format: For people: what it is.
        parts: Component name → component.
        step: As the format says; None where it does not.
        left_out: What was not imported, one sentence each.
        missing: What is always written beside what is there, and is not there: the checkpoint is incomplete.
    """

    format: str
    parts: Mapping[str, Part]
    step: int | None = None
    left_out: tuple[str, ...] = field(default=())
    missing: tuple[str, ...] = field(default=())


def module(entries: Mapping[str, object]) -> Part:
    """The weights of a module, by name."""
    return Part("module", {"entries": dict(entries)})


KINDS = ("module", "optimizer", "stateful", "container", "value", "tensor")
"""The kinds that a caller may choose for a component."""


def as_kind(tree: object, kind: str) -> Part:
    """*tree*, a state of its own, as a component of *kind*. Raises ValueError if it cannot be one."""
    if kind == "module" and isinstance(tree, dict) and all(type(key) is str for key in tree):
        return module(tree)
    fits = {
        "optimizer": is_optimizer(tree),
        "stateful": True,
        "container": type(tree) in _CONTAINERS,
        "value": True,
        "tensor": isinstance(tree, ForeignTensor),
    }
    if not fits.get(kind, False):
        raise ValueError(f"a {type(tree).__name__} cannot be a component of kind {kind!r}; kinds: {', '.join(KINDS)}")
    return Part(kind if kind != "optimizer" else "stateful", tree)


def raw(part: Part) -> object:
    """The state that *part* was made of: a module's without the frame of its kind."""
    if isinstance(part.tree, Document):
        raise FormatError("the file says itself what its components are: leave the kinds away")
    return cast("dict[str, object]", part.tree)["entries"] if part.kind == "module" else part.tree


def guessed(tree: object) -> Part:
    """*tree* as what it most likely is the state of."""
    if isinstance(tree, ForeignTensor):
        return Part("tensor", tree)
    if is_optimizer(tree) or _is_stateful(tree):
        return Part("stateful", tree)
    if is_module(tree):
        return module(tree)
    return Part("container" if type(tree) in _CONTAINERS else "value", tree)


def is_module(tree: object) -> TypeGuard[Mapping[str, object]]:
    """Whether *tree* looks like the ``state_dict`` of a module: tensors by name, and nothing else."""
    return (
        isinstance(tree, dict)
        and bool(tree)
        and all(
            type(key) is str and (isinstance(value, ForeignTensor) or key.endswith(_EXTRA))
            for key, value in tree.items()
        )
    )


def is_optimizer(tree: object) -> bool:
    """Whether *tree* looks like the ``state_dict`` of an optimizer."""
    return (
        isinstance(tree, dict)
        and tree.keys() == {"state", "param_groups"}
        and isinstance(tree["state"], dict)
        and isinstance(tree["param_groups"], list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in tree["param_groups"])
    )


def _is_stateful(tree: Any) -> bool:
    """Whether *tree* looks like the state of a scheduler or of a GradScaler."""
    return isinstance(tree, dict) and any(tree.keys() >= keys for keys in _SIGNS)


_EXTRA = "_extra_state"
_CONTAINERS = (dict, list)
_SIGNS = ({"last_epoch", "_step_count"}, {"scale", "growth_factor", "backoff_factor"}, {"best", "num_bad_epochs"})
