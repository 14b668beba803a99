"""
Optimizers, keyed by the names of their parameters.

``Optimizer.load_state_dict`` goes by position, and casts moments to the type of the parameter. So what is stored is by
name; on restore a positional state is built in the order of the live parameters, loaded through the optimizer's own
method (its hooks run, subclasses keep their say), and then every value that this has cast is put back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any, cast

import msgspec
import torch
from torch.optim import Optimizer

from ckptman.errors import UnsupportedState
from ckptman.format.values import Ready, TensorRef, are_plain_keys, tensor_tree
from ckptman.state import flat, modules
from ckptman.state.collecting import Collector, is_shown_as_it_is
from ckptman.state.filling import CPU, Filling, Give, Phase, give_back
from ckptman.state.stored import Stored
from ckptman.state.tensors import dtype_of, fresh
from ckptman.state.trees import give_tree

Members = dict[str, torch.Tensor]

_STANDARD = {"state", "param_groups"}

# what load_state_dict walks through or passes on unharmed; other values (text, arrays) it takes for sequences
_CARRIED = (torch.Tensor, dict, list, tuple, int, float, complex, type(None))


class Group(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``members``: name → shape. ``settings``: the learning rate and all else that the group holds."""

    members: dict[str, tuple[int, ...]]
    settings: dict[str, Any]


class OptimizerState(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """
    ``kind``: the optimizer's class, for people; empty where an import could not know it. ``state``: member → its
    state. ``other``: state of no parameter.
    """

    kind: str
    groups: list[Group]
    state: dict[str, Any]
    other: dict[Any, Any] = {}


def names_of_parameters(state: Mapping[str, object]) -> dict[int, tuple[str, ...]]:
    """
    ``id`` of every parameter of the modules and every tensor component of *state* → its names, the first one first.

    A tied parameter has several. The names are those of the tensors in the checkpoint: ``model/encoder.weight``.
    """
    names: dict[int, tuple[str, ...]] = {}
    if not any(isinstance(live, Optimizer) for live in state.values()):
        return names  # only optimizers ask for them
    for component, live in state.items():
        for name, tensor in _tensors_of(live):
            names[id(tensor)] = (*names.get(id(tensor), ()), f"{component}/{name}")
    return names


def _tensors_of(live: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(live, torch.nn.Module):
        yield from modules.parameters(live)
    elif isinstance(live, torch.Tensor):
        yield "value", live


def is_standard(state: object) -> bool:
    """Whether *state* is what `Optimizer.state_dict` gives, and not a format of the subclass's own."""
    return (
        isinstance(state, dict)
        and state.keys() == _STANDARD
        and isinstance(state["state"], dict)
        and isinstance(state["param_groups"], list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in state["param_groups"])
    )


class OwnFormat(msgspec.Struct, frozen=True):
    """The ``state_dict`` of an optimizer that is not standard: to be given back as it is."""

    state: object


def capture(optimizer: Optimizer, collector: Collector) -> dict[str, Any] | OwnFormat:
    """
    The state of *optimizer* by name, or in its own format. Asks for it once: a second answer might be another.

    Raises:
        UnsupportedState: A parameter has no name in the state.
    """
    packed: Any = optimizer.state_dict()
    if not is_standard(packed):
        return OwnFormat(packed)
    names: dict[int, str] = {}
    parameters: dict[int, torch.Tensor] = {}
    groups = []
    for index, (group, live) in enumerate(zip(packed["param_groups"], optimizer.param_groups, strict=True)):
        members = {}
        for position, (number, parameter) in enumerate(zip(group["params"], live["params"], strict=True)):
            name = _name(collector.members.get(id(parameter), ()), parameter, collector.component, index, position)
            names[number], parameters[number] = name, parameter
            members[name] = tuple(flat.whole(parameter).shape)
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({"members": members, "settings": settings})
    states = {names[key]: value for key, value in packed["state"].items() if key in names}
    return {
        "kind": type(optimizer).__qualname__,
        "groups": groups,
        "state": _taken(states, collector)
        or {names[key]: _plain(value, parameters[key]) for key, value in packed["state"].items() if key in names},
        "other": {key: value for key, value in packed["state"].items() if key not in names},
    }


def _taken(states: Mapping[str, object], collector: Collector) -> Ready | None:
    """
    *states*, by member, as they will be read back; their tensors are taken, all at once, under ``<member>.<key>``.

    None, and nothing is taken, where one holds anything else than tensors, or one of these is special.
    """
    members = cast("Mapping[str, dict[str, object]]", states)
    if flat.is_in_use() or not {dict}.issuperset(map(type, states.values())) or not are_plain_keys(states.keys()):
        return None
    keys = [key for values in members.values() for key in values]
    if not are_plain_keys(keys) or not is_shown_as_it_is("".join((*states, *keys))):
        return None
    names = [f"{member}.{key}" for member, values in members.items() for key in values]
    full = collector.take_all(names, [tensor for values in members.values() for tensor in values.values()])
    if full is None:
        return None
    trees = map(tensor_tree, full)  # each member takes as many of them as it has keys
    return Ready({member: dict(zip(values, trees, strict=False)) for member, values in members.items()})


def _plain(values: object, parameter: torch.Tensor) -> object:
    """The state of *parameter* as a dict of its own, whatever kind of dict the optimizer uses."""
    return {key: flat.beside(parameter, one) for key, one in values.items()} if isinstance(values, dict) else values


def _name(names: tuple[str, ...], parameter: torch.Tensor, component: str, group: int, position: int) -> str:
    if not names:
        path = f"{component}.param_groups[{group}]['params'][{position}]"
        raise UnsupportedState(
            f"{path}, a parameter of shape {list(parameter.shape)}, has no name: no module of the state owns it. "
            "Add the module that owns it to the state",
            path=path,
        )
    return names[0]


def prepare(optimizer: Optimizer, stored: Stored, filling: Filling) -> None:
    """Match groups by position and members by name, and place the state of every live member."""
    saved = _put_together(stored)
    live = [_live_members(group, number, saved, stored, filling) for number, group in enumerate(optimizer.param_groups)]
    if len(live) != len(saved.groups):
        filling.differences.fatal(
            f"{stored.name}: groups of parameters", live=str(len(live)), checkpoint=str(len(saved.groups))
        )
        return
    if saved.kind and type(optimizer).__qualname__ != saved.kind:
        filling.differences.tolerable(
            f"{stored.name}: expected the state of a {type(optimizer).__qualname__}, found that of a {saved.kind}"
        )
    for number, (members, group) in enumerate(zip(live, saved.groups, strict=True)):
        _compare_members(f"{stored.name}: group {number}", members, group, filling)
    loading = _Loading(optimizer, saved, stored, filling, live)
    filling.later(Phase.OPTIMIZERS, loading.load)


def _put_together(stored: Stored) -> OptimizerState:
    """
    What is stored for this rank, and what only others kept of tensors of which each rank had a part.

    FSDP1 gives an optimizer nothing to keep for a parameter of which a rank holds no element.
    """
    saved = stored.read(OptimizerState)
    state = dict(saved.state)
    for other in stored.of_others():
        theirs = other.read(OptimizerState).state
        state.update((name, one) for name, one in theirs.items() if name not in state and _is_in_parts(one, stored))
    return msgspec.structs.replace(saved, state=state)


def _is_in_parts(values: object, stored: Stored) -> bool:
    refs = values.values() if isinstance(values, dict) else ()
    return any(isinstance(ref, TensorRef) and stored.is_in_parts(ref) for ref in refs)


def _live_members(
    group: Mapping[str, Any], number: int, saved: OptimizerState, stored: Stored, filling: Filling
) -> Members:
    """The live parameters of one group by name: of several names, the one that was saved."""
    known = {name for saved_group in saved.groups for name in saved_group.members}
    members = {}
    for position, parameter in enumerate(group["params"]):
        names = filling.members.get(id(parameter), ())
        first = _name(names, parameter, stored.name, number, position)
        members[next((name for name in names if name in known), first)] = parameter
    return members


def _compare_members(where: str, live: Members, group: Group, filling: Filling) -> None:
    modules.compare_names(where, list(live), list(group.members), filling)
    for name, parameter in live.items():
        extent = tuple(flat.whole(parameter).shape)
        shape = group.members.get(name, extent)
        if shape != extent:
            filling.differences.resized(
                f"{where}: {name}", live=f"a parameter {list(extent)}", checkpoint=f"one {list(shape)}"
            )


class _Loading:
    """One optimizer on its way back: what was placed for it, in the order of its live parameters."""

    def __init__(
        self, optimizer: Optimizer, saved: OptimizerState, stored: Stored, filling: Filling, groups: list[Members]
    ) -> None:
        self._optimizer = optimizer
        self._name = stored.name
        self._groups = groups
        self._settings = [give_tree(None, group.settings, stored, filling) for group in saved.groups]
        self._other = give_tree(None, saved.other, stored, filling)
        self._states: dict[str, Give] = {}
        for members, group in zip(groups, saved.groups, strict=True):
            step_is_on_cpu = not (group.settings.get("capturable") or group.settings.get("fused"))
            for name, parameter in members.items():
                if name in saved.state and not flat.is_nothing(parameter):
                    seating = _Seating(parameter, stored, step_is_on_cpu=step_is_on_cpu)
                    seats = seating.tree(optimizer.state.get(parameter), saved.state[name])
                    give = give_tree(seats, saved.state[name], stored, filling, device=parameter.device)
                    self._states[name] = give

    def load(self) -> None:
        """Give the optimizer its state, exactly."""
        exact = {name: flat.held(give()) for name, give in self._states.items()}
        members = [pair for group in self._groups for pair in group.items()]
        packed = {
            "state": {
                **{number: _carried(exact[name]) for number, (name, _) in enumerate(members) if name in exact},
                **cast(dict[Any, Any], self._other()),
            },
            "param_groups": self._packed_groups(),
        }
        give_back(self._name, lambda: self._optimizer.load_state_dict(packed))
        for name, parameter in members:
            if name in exact and parameter in self._optimizer.state:
                self._optimizer.state[parameter] = settled(self._optimizer.state[parameter], exact[name])

    def _packed_groups(self) -> list[dict[str, Any]]:
        numbers = count()
        return [
            {**cast(dict[str, Any], settings()), "params": _Numbers(islice(numbers, len(group)))}
            for settings, group in zip(self._settings, self._groups, strict=True)
        ]


class _Numbers(list[int]):
    """Consecutive numbers. ``load_state_dict`` asks for each tensor which group has its number: not by a search."""

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and bool(self) and self[0] <= number <= self[-1]


class _Seating:
    """
    Finds or makes the tensors that take a parameter's state.

    A live tensor that agrees is filled in place. A new one is where `Optimizer.load_state_dict` would move it: on the
    parameter's device, but ``step`` on the CPU unless the group is fused or capturable; and in the parameter's memory
    format where it has its shape.
    """

    def __init__(self, parameter: torch.Tensor, stored: Stored, *, step_is_on_cpu: bool) -> None:
        self._parameter = parameter
        self._stored = stored
        self._step_is_on_cpu = step_is_on_cpu

    def tree(self, live: Any, saved: Any, key: object = None) -> object:
        if isinstance(saved, TensorRef):
            live = flat.beside(self._parameter, live)
            return self._seat(live, saved, CPU if key == "step" and self._step_is_on_cpu else self._parameter.device)
        if type(saved) is dict:
            old = live if isinstance(live, dict) else {}
            return {name: self.tree(old.get(name), value, name) for name, value in saved.items()}
        if type(saved) in (list, tuple):
            fits = isinstance(live, list | tuple) and len(live) == len(saved)
            pairs = zip(live if fits else [None] * len(saved), saved, strict=True)
            return type(saved)(self.tree(one, other) for one, other in pairs)
        return None

    def _seat(self, live: object, ref: TensorRef, device: torch.device) -> torch.Tensor | None:
        if isinstance(live, torch.Tensor) and live.device == device and self._stored.agrees(ref, live):
            return live
        if self._stored.note(ref).parts:
            return None
        stored = self._stored.tensors[ref.name]
        return fresh(dtype_of(stored.dtype), stored.shape, device=device, like=flat.whole(self._parameter))


def _carried(value: Any) -> Any:
    """*value* with None for everything that ``load_state_dict`` would take apart as if it were a list."""
    if type(value) is dict:
        return {key: _carried(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_carried(part) for part in value)
    return value if isinstance(value, _CARRIED) else None


def settled(loaded: Any, exact: Any) -> Any:
    """*loaded* with the exact values where ``load_state_dict`` has cast a tensor, or was not given a value."""
    if isinstance(exact, torch.Tensor):
        is_cast = isinstance(loaded, torch.Tensor) and loaded.shape == exact.shape and loaded.dtype != exact.dtype
        return exact.to(loaded.device) if is_cast else loaded
    if type(exact) is dict and isinstance(loaded, dict):
        for key in exact.keys() & loaded.keys():
            loaded[key] = settled(loaded[key], exact[key])
        return loaded
    if type(exact) in (list, tuple) and type(loaded) is type(exact) and len(loaded) == len(exact):
        return type(exact)(settled(one, other) for one, other in zip(loaded, exact, strict=True))
    return exact if loaded is None else loaded
