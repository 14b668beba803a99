"""
Random numbers: the global streams of Python, NumPy and torch, and generators that the user made.

A stream that is put back continues bit for bit. *Not* kept: how many children a NumPy generator has spawned.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import torch

from ckptman.state.collecting import Collector
from ckptman.state.filling import CPU, Filling, Phase
from ckptman.state.stored import Stored
from ckptman.state.trees import give_tree


class GlobalStreams(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The state of the process's own streams. ``devices``: type of accelerator → one state per device."""

    python: Any
    numpy: Any
    torch: Any
    devices: dict[str, list[Any]]


class GeneratorState(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``family``: the type of a torch generator's device, or the name of NumPy's bit generator."""

    family: str
    state: Any


def snapshot() -> GlobalStreams:
    """The state of all global streams now. Starts no accelerator that the process has not started itself."""
    devices = {name: _states(name, module) for name, module in _accelerators()}
    return GlobalStreams(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), devices)


def put_back(streams: GlobalStreams) -> None:
    """Make all global streams continue from *streams*. What this machine does not have is left out."""
    random.setstate(streams.python)
    if _fits_numpy(streams):
        np.random.set_state(streams.numpy)
    torch.set_rng_state(streams.torch)
    for name, states in streams.devices.items():
        module = _module_of(name)
        if name == "mps" and module is not None:
            module.set_rng_state(states[0])
        elif module is not None:
            for index, state in enumerate(states[: module.device_count()]):
                module.set_rng_state(state, index)


def seed(number: int) -> None:
    """Make all global streams begin anew from *number*."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


@contextmanager
def untouched() -> Iterator[GlobalStreams]:
    """Within the block anything may draw random numbers: afterwards the global streams are where they were."""
    before = snapshot()
    try:
        yield before
    finally:
        if not _same(before, snapshot()):
            put_back(before)


def _same(one: GlobalStreams, other: GlobalStreams) -> bool:
    return (
        one.python == other.python
        and _comparable(one.numpy) == _comparable(other.numpy)
        and torch.equal(one.torch, other.torch)
        and all(
            torch.equal(state, now)
            for name, states in one.devices.items()
            for state, now in zip(states, other.devices.get(name, ()), strict=False)
        )
    )


def _comparable(numpy_state: Mapping[str, Any]) -> object:
    """What tells two states of NumPy's global stream apart: arrays as bytes."""
    return {
        key: _comparable(value)
        if isinstance(value, dict)
        else value.tobytes()
        if isinstance(value, np.ndarray)
        else value
        for key, value in numpy_state.items()
    }


def _accelerators() -> list[tuple[str, ModuleType]]:
    """Those that this process uses."""
    found = [(name, module) for name in ("cuda", "xpu", "mps") if (module := _module_of(name)) is not None]
    return [(name, module) for name, module in found if name == "mps" or module.is_initialized()]


def _module_of(name: str) -> ModuleType | None:
    """The module of torch for an accelerator; None where there is none on this machine."""
    module: ModuleType | None = {"cuda": torch.cuda, "xpu": getattr(torch, "xpu", None), "mps": torch.mps}.get(name)
    is_there = torch.backends.mps.is_available() if name == "mps" else module is not None and module.is_available()
    return module if is_there else None


def _states(name: str, module: ModuleType) -> list[torch.Tensor]:
    return [module.get_rng_state()] if name == "mps" else list(module.get_rng_state_all())


def _fits_numpy(streams: GlobalStreams) -> bool:
    return bool(np.random.get_state(legacy=False)["bit_generator"] == streams.numpy["bit_generator"])


def capture_global(live: GlobalStreams, collector: Collector) -> dict[str, Any]:
    """The component ``rng``: a `snapshot`."""
    return msgspec.structs.asdict(live)


def prepare_global(stored: Stored, filling: Filling) -> None:
    """Restore the global streams, last of all; warn of what this machine does not have."""
    saved = stored.read(GlobalStreams)
    give = give_tree(None, stored.tree, stored, filling, device=CPU)
    for name, states in saved.devices.items():
        module = _module_of(name)
        count = 0 if module is None else 1 if name == "mps" else module.device_count()
        if count != len(states):
            filling.warnings.append(
                f"random streams: {len(states)} random streams of {name} devices were saved, {count} are here"
            )
    if not _fits_numpy(saved):
        filling.warnings.append(
            f"random streams: NumPy's global stream was a {saved.numpy['bit_generator']} and is now another: "
            "it is not restored"
        )
    filling.later(Phase.RNG, lambda: put_back(msgspec.convert(give(), GlobalStreams)))


def capture_torch(generator: torch.Generator, collector: Collector) -> dict[str, Any]:
    """A ``torch.Generator``."""
    return {"family": generator.device.type, "state": generator.get_state()}


def prepare_torch(generator: torch.Generator, stored: Stored, filling: Filling) -> None:
    """A ``torch.Generator``, of the same type of device."""
    if _same_family(stored, generator.device.type, filling):
        give = give_tree(None, stored.read(GeneratorState).state, stored, filling, device=CPU)
        filling.later(Phase.OTHERS, lambda: _set(generator, give()))


def capture_numpy(generator: np.random.Generator | np.random.RandomState, collector: Collector) -> dict[str, Any]:
    """A NumPy generator, new or legacy."""
    state = _numpy_state(generator)
    return {"family": state["bit_generator"], "state": state}


def prepare_numpy(generator: np.random.Generator | np.random.RandomState, stored: Stored, filling: Filling) -> None:
    """A NumPy generator, of the same class and bit generator."""
    if not _same_family(stored, _numpy_state(generator)["bit_generator"], filling):
        return
    give = give_tree(None, stored.read(GeneratorState).state, stored, filling)

    filling.later(Phase.OTHERS, lambda: _set(generator, give()))


def _set(generator: torch.Generator | np.random.Generator | np.random.RandomState, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _numpy_state(generator: np.random.Generator | np.random.RandomState) -> dict[str, Any]:
    if isinstance(generator, np.random.Generator):
        return dict(generator.bit_generator.state)
    return dict(generator.get_state(legacy=False))


def _same_family(stored: Stored, live: str, filling: Filling) -> bool:
    saved = stored.read(GeneratorState).family
    if saved != live:
        filling.differences.fatal(stored.name, live=f"a generator of {live}", checkpoint=f"one of {saved}")
    return saved == live
