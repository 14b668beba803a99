"""What a component of the state may be: one table, from the most special kind to the most general."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckptman.format.names import check_component
from ckptman.state import loaders, modules, optimizers, plain, rng
from ckptman.state.collecting import Collector
from ckptman.state.filling import Filling
from ckptman.state.stored import Stored
from ckptman.state.trees import CONTAINERS

RNG = "rng"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """
    How components of one kind are saved and given back.

    Attributes:
        name: As it stands in the manifest.
        fits: Whether a live object is of this kind.
        capture: (live, collector) → its tree, as typed values can hold it; tensors may still be in it.
        prepare: (live, stored, filling): compare, place, and leave steps; touch nothing.
    """

    name: str
    fits: Callable[[Any], bool]
    capture: Callable[[Any, Collector], object]
    prepare: Callable[[Any, Stored, Filling], None]


def _is_stateful(live: object) -> bool:
    return not isinstance(live, type) and all(
        callable(getattr(live, method, None)) for method in ("state_dict", "load_state_dict")
    )


def _is_one_of(*types: type) -> Callable[[object], bool]:
    return lambda live: isinstance(live, types)


_MODULE = Kind(name="module", fits=_is_one_of(torch.nn.Module), capture=modules.capture, prepare=modules.prepare)
_OPTIMIZER = Kind(
    name="optimizer",
    fits=_is_one_of(torch.optim.Optimizer),
    capture=optimizers.capture,
    prepare=optimizers.prepare,
)
_LOADER = Kind(name="loader", fits=loaders.is_loader, capture=loaders.capture, prepare=loaders.prepare)
_TORCH_GENERATOR = Kind(
    name="torch-generator",
    fits=_is_one_of(torch.Generator),
    capture=rng.capture_torch,
    prepare=rng.prepare_torch,
)
_NUMPY_GENERATOR = Kind(
    name="numpy-generator",
    fits=_is_one_of(np.random.Generator),
    capture=rng.capture_numpy,
    prepare=rng.prepare_numpy,
)
_NUMPY_RANDOM_STATE = Kind(
    name="numpy-random-state",
    fits=_is_one_of(np.random.RandomState),
    capture=rng.capture_numpy,
    prepare=rng.prepare_numpy,
)
_TENSOR = Kind(name="tensor", fits=_is_one_of(torch.Tensor), capture=plain.capture_tensor, prepare=plain.prepare_tensor)
_ARRAY = Kind(
    name="array",
    fits=lambda live: type(live) is np.ndarray,
    capture=plain.capture_array,
    prepare=plain.prepare_array,
)
_STATEFUL = Kind(name="stateful", fits=_is_stateful, capture=plain.capture_stateful, prepare=plain.prepare_stateful)
_CONTAINER = Kind(
    name="container",
    fits=lambda live: type(live) in CONTAINERS,
    capture=plain.capture_whole,
    prepare=plain.prepare_container,
)
_VALUE = Kind(name="value", fits=lambda _: True, capture=plain.capture_whole, prepare=plain.prepare_value)
GLOBAL_RNG = Kind(
    name="rng",
    fits=lambda live: isinstance(live, rng.GlobalStreams),
    capture=rng.capture_global,
    prepare=lambda _, stored, filling: rng.prepare_global(stored, filling),
)

KINDS = (
    _MODULE,
    _OPTIMIZER,
    _LOADER,
    _TORCH_GENERATOR,
    _NUMPY_GENERATOR,
    _NUMPY_RANDOM_STATE,
    _TENSOR,
    _ARRAY,
    _STATEFUL,
    _CONTAINER,
    GLOBAL_RNG,
    _VALUE,
)
"""The first that fits is the kind of a live object."""


def kind_of(live: object) -> Kind:
    """How *live* is saved, by its type alone."""
    return next(kind for kind in KINDS if kind.fits(live))


def capture_component(live: object, collector: Collector) -> tuple[str, bytes]:
    """
    The kind and the values of *live*; its tensors are in *collector* then.

    Raises:
        UnsupportedState: It cannot be saved; the path says what.
    """
    kind = kind_of(live)
    tree = kind.capture(live, collector)
    if isinstance(tree, optimizers.OwnFormat):
        kind, tree = _STATEFUL, tree.state
    return kind.name, collector.document(tree)


def prepare_component(live: object, stored: Stored, filling: Filling) -> None:
    """Prepare *live* to take what is *stored*; note a difference if it is of another kind."""
    kind = kind_of(live)
    if kind is _OPTIMIZER and stored.kind == _STATEFUL.name:
        kind = _STATEFUL
    if kind.name == stored.kind:
        kind.prepare(live, stored, filling)
        return
    filling.differences.fatal(
        stored.name, live=f"a component of kind {kind.name!r} ({type(live).__name__})", checkpoint=f"{stored.kind!r}"
    )


def check_state(state: object, *, rng: bool = True) -> dict[str, object]:
    """
    Return *state* as a dict, if every component has a name that can be one.

    Raises:
        TypeError: *state* is no mapping, or a name is no text.
        ValueError: A name breaks the pattern, is ``rng`` while random streams are saved under it, or differs from
            another only by case (some file systems would take them for one).
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to components, got {type(state).__name__}")
    seen: dict[str, str] = {}
    for name in state:
        if not isinstance(name, str):
            raise TypeError(f"components are named by text, got {name!r} ({type(name).__name__})")
        check_component(name)
        if rng and name.lower() == RNG:
            raise ValueError(f"the component name {name!r} is taken: random streams are saved as 'rng' (see rng=False)")
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ValueError(f"the component names {other!r} and {name!r} differ only by case: rename one of them")
    return dict(state)
