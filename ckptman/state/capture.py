"""The whole state, captured: the road from live objects to leaves and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ckptman.state.collecting import Collector, Leaf
from ckptman.state.dtensor import settle
from ckptman.state.kinds import RNG, capture_component
from ckptman.state.optimizers import names_of_parameters
from ckptman.state.rng import untouched

__all__ = ["Captured", "Leaf", "capture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """
    One component, captured.

    Attributes:
        kind: How it was captured, and is to be given back.
        leaves: Its tensors, which share memory with the live ones.
        values: All else as typed JSON, where the tensors are referred to by name.
        aliases: Name of a tensor that is tied to another → name of that other, under which it is stored.
    """

    kind: str
    leaves: tuple[Leaf, ...]
    values: bytes
    aliases: Mapping[str, str]


def capture(state: Mapping[str, object], *, rng: bool) -> dict[str, Captured]:
    """
    Capture every component of *state*, in its order, and then the global random streams as ``rng``.

    Changes nothing in the training run: no random stream, no optimizer's state, no tensor, no loader. Leaves share
    memory with live tensors, so they are to be copied before training goes on; values are a copy already.

    Args:
        state: Component name → live object. See `ckptman.state.kinds` for what it may be.
        rng: Whether to capture the global random streams.

    Raises:
        UnsupportedState: Something cannot be saved without pickle; its ``path`` says what.
    """
    settle(state)
    members = names_of_parameters(state)
    # foreign state_dict methods may draw random numbers: what is captured is what was before any of them
    with torch.inference_mode(False), torch.no_grad(), untouched() as streams:
        live = {**state, RNG: streams} if rng else state
        return {name: _component(name, component, members) for name, component in live.items()}


def _component(name: str, live: object, members: Mapping[int, tuple[str, ...]]) -> Captured:
    collector = Collector(name, members)
    kind, values = capture_component(live, collector)
    return Captured(kind=kind, leaves=tuple(collector.leaves), values=values, aliases=collector.aliases)
