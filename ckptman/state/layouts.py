"""
Tensors that are more than one block of memory: sparse ones, and subclasses that say how they are flattened.

Such a tensor is taken apart into plain ones, each stored under a name of its own; a `Note` in the component's values
says how they belong together. A subclass is never made from a file: on restore, the parts of the live object are
filled, and its class and metadata must be the saved ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import msgspec
import torch
from torch.nn.parameter import Parameter

from ckptman.errors import FormatError, UnsupportedState

STRIDED = "strided"
SUBCLASS = "subclass"
ARRAY = "array"


class Note(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """
    What the values say of one tensor, where the manifest's name, dtype and shape do not say everything.

    Attributes:
        layout: ``strided``; a sparse layout, as torch calls it; ``subclass``; or ``array``: a NumPy array that torch
            has no dtype for, stored as its bytes.
        shape: The shape of the whole, where it has parts.
        parts: Name of a part → name of the stored tensor.
        facts: What else the layout needs.
        device: Where it was, if not on the CPU.
        requires_grad, parameter: How to make a new one.
    """

    layout: str = STRIDED
    shape: tuple[int, ...] = ()
    parts: dict[str, str] = {}
    facts: dict[str, Any] = {}
    device: str | None = None
    requires_grad: bool = False
    parameter: bool = False

    def to_tree(self) -> dict[str, object]:
        """The note as a dict for the typed values; defaults are left out."""
        return {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) != _DEFAULTS[name]}


_DEFAULTS = msgspec.structs.asdict(Note())


class _Flattenable(Protocol):
    def __tensor_flatten__(self) -> tuple[list[str], object]: ...


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor taken apart."""

    layout: str
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any] = {}


def take_apart(tensor: torch.Tensor) -> Parts:
    """The parts of a sparse *tensor*. They share its memory."""
    whole = tensor.detach()
    layout = str(whole.layout).removeprefix("torch.")
    if whole.layout == torch.sparse_coo:
        # the underscored accessors are the only ones that serve an uncoalesced tensor as it is
        tensors = {"indices": whole._indices(), "values": whole._values()}
        return Parts(layout=layout, tensors=tensors, facts={"coalesced": whole.is_coalesced()})
    if whole.layout in (torch.sparse_csr, torch.sparse_bsr):
        indices = {"crow_indices": whole.crow_indices(), "col_indices": whole.col_indices()}
    else:
        indices = {"ccol_indices": whole.ccol_indices(), "row_indices": whole.row_indices()}
    return Parts(layout=layout, tensors={**indices, "values": whole.values()})


def put_together(note: Note, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    The sparse tensor that *note* describes, from its parts.

    Raises:
        FormatError: The parts do not make one (their indices are checked: they come from a file).
    """
    try:
        if note.layout == "sparse_coo":
            return torch.sparse_coo_tensor(
                tensors["indices"],
                tensors["values"],
                note.shape,
                is_coalesced=bool(note.facts["coalesced"]),
                check_invariants=True,
            )
        make, outer, inner = _COMPRESSED[note.layout]
        return make(tensors[outer], tensors[inner], tensors["values"], note.shape, check_invariants=True)
    except (KeyError, RuntimeError) as error:
        raise FormatError(f"the parts {sorted(note.parts)} do not make a {note.layout} tensor: {error}") from error


_COMPRESSED: dict[str, tuple[Callable[..., torch.Tensor], str, str]] = {
    "sparse_csr": (torch.sparse_csr_tensor, "crow_indices", "col_indices"),
    "sparse_bsr": (torch.sparse_bsr_tensor, "crow_indices", "col_indices"),
    "sparse_csc": (torch.sparse_csc_tensor, "ccol_indices", "row_indices"),
    "sparse_bsc": (torch.sparse_bsc_tensor, "ccol_indices", "row_indices"),
}


PARTS = {
    "sparse_coo": {"indices", "values"},
    **{layout: {outer, inner, "values"} for layout, (_, outer, inner) in _COMPRESSED.items()},
}
"""The names of the parts of every sparse layout."""


def take_subclass_apart(tensor: torch.Tensor, path: str) -> Parts:
    """
    The parts of an instance of a tensor subclass, by its own ``__tensor_flatten__``.

    Raises:
        UnsupportedState: The class has no such method.
    """
    kind = type(tensor)
    if not hasattr(tensor, "__tensor_flatten__"):
        raise refused_subclass(tensor, path)
    attributes, metadata = cast(_Flattenable, tensor).__tensor_flatten__()
    return Parts(
        layout=SUBCLASS,
        tensors={name: getattr(tensor, name) for name in attributes},
        facts={"class": f"{kind.__module__}.{kind.__qualname__}", "metadata": metadata},
    )


def refused_subclass(tensor: torch.Tensor, path: str) -> UnsupportedState:
    """The error for an instance of a tensor subclass at a place where none can be restored."""
    kind = type(tensor)
    return UnsupportedState(
        f"cannot save {path}: {kind.__module__}.{kind.__qualname__} is a subclass of torch.Tensor, and no class is "
        "looked up by a name from a file. Subclasses with __tensor_flatten__ are saved as parameters and buffers of "
        "a module, or as a component of their own; elsewhere, pass value.as_subclass(torch.Tensor)",
        path=path,
    )


def dress(tensor: torch.Tensor, note: Note) -> torch.Tensor:
    """A new *tensor* as *note* says it was: a Parameter, requiring a gradient."""
    if note.parameter:
        return Parameter(tensor, requires_grad=note.requires_grad)
    return tensor.requires_grad_(note.requires_grad)
