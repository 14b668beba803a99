"""
Data loaders that resume in the middle of an epoch: torchdata's ``StatefulDataLoader``, known by its attributes.

Its ``state_dict`` is only called once it iterates. Before, it would create the iterator: draw from random streams and
start workers. And its iterator, made anew from a state, draws a seed that the running one drew long ago. So there are
three cases, and in each a resumed loader draws as many random numbers as one that was never interrupted:

    fresh     never iterated: the states of its generators and of its stateful parts are kept
    loaded    given a state, not yet iterated: that state is kept, and the iterator is made when it is asked for
    running   its own state is kept; on restore the iterator is made at once, before random streams are put back

*Not* kept: the random streams within worker processes, which torchdata does not save either.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import msgspec
import torch

from ckptman.state.collecting import Collector
from ckptman.state.filling import CPU, Filling, Phase, give_back
from ckptman.state.stored import Stored
from ckptman.state.trees import give_tree

_MARKS = ("_iterator", "_initial_iter_for_state_dict", "next_iter_state")
_PARTS = ("dataset", "sampler", "batch_sampler")


class LoaderState(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``parts`` are the states of dataset and samplers, where these are stateful and the loader is fresh."""

    phase: Literal["fresh", "loaded", "running"]
    loader: Any
    generators: dict[str, Any]
    parts: dict[str, Any]


def is_loader(live: object) -> bool:
    """Whether *live* is a loader of this kind."""
    return all(hasattr(live, mark) for mark in _MARKS)


def capture(loader: Any, collector: Collector) -> dict[str, Any]:
    """The position of *loader* in its data. Makes no iterator, starts no worker, draws no number."""
    generators = {name: generator.get_state() for name, generator in _generators(loader).items()}
    if loader._iterator is not None:
        return {"phase": "running", "loader": loader.state_dict(), "generators": generators, "parts": {}}
    if loader.next_iter_state is not None:
        return {"phase": "loaded", "loader": loader.next_iter_state, "generators": generators, "parts": {}}
    parts = {name: part.state_dict() for name, part in _stateful_parts(loader).items()}
    return {"phase": "fresh", "loader": None, "generators": generators, "parts": parts}


def prepare(loader: Any, stored: Stored, filling: Filling) -> None:
    """Compare the stateful parts; what else the loader's state demands only torchdata knows."""
    saved = stored.read(LoaderState)
    give = give_tree(None, stored.tree, stored, filling, device=CPU)
    live = {*_generators(loader), *(_stateful_parts(loader) if saved.phase == "fresh" else ())}
    for name in sorted({*saved.generators, *saved.parts} ^ live):
        filling.differences.tolerable(f"{stored.name}: {name} is there on one side only")
    filling.later(Phase.OTHERS, lambda: _load(loader, msgspec.convert(give(), LoaderState), stored.name))


def _load(loader: Any, saved: LoaderState, name: str) -> None:
    for part, live in _stateful_parts(loader).items():
        if part in saved.parts:
            give_back(f"{name}.{part}", partial(live.load_state_dict, saved.parts[part]))
    loader.next_iter_state = None
    give_back(name, lambda: loader.load_state_dict(saved.loader or {}))
    if saved.phase == "running":
        give_back(name, loader.state_dict)  # makes the iterator, which the next iter() then takes
    for place, generator in _generators(loader).items():
        if place in saved.generators:
            generator.set_state(saved.generators[place])


def _generators(loader: Any) -> dict[str, torch.Generator]:
    """The generators that the loader and its samplers draw from, by where they are."""
    places = {
        "generator": loader,
        "sampler.generator": getattr(loader, "sampler", None),
        "batch_sampler.sampler.generator": getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    }
    found = {name: getattr(owner, "generator", None) for name, owner in places.items()}
    return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}


def _stateful_parts(loader: Any) -> dict[str, Any]:
    parts = {name: getattr(loader, name, None) for name in _PARTS}
    return {name: part for name, part in parts.items() if hasattr(part, "load_state_dict")}
