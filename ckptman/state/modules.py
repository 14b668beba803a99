"""
Modules: parameters and persistent buffers by name, filled in place; the names are those of the unwrapped module.

``torch.compile``, ``DistributedDataParallel``, ``DataParallel`` and FSDP1 put a module into another and its names
behind a prefix. They are recognised by type, at any depth, and left out, so that a checkpoint does not depend on them.

A module tree that has a say of its own in saving or loading (hooks, overridden methods) is asked through its
``state_dict`` and restored through its ``load_state_dict`` instead.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from ckptman.format.values import Ready, TensorRef, are_plain_keys, tensor_tree
from ckptman.state import flat
from ckptman.state.collecting import Collector
from ckptman.state.dtensor import is_of_fsdp2, is_sharded
from ckptman.state.filling import Filling, Give, GiveTensor, Phase, give_back
from ckptman.state.stored import Stored
from ckptman.state.tensors import check_savable, describe, fresh
from ckptman.state.trees import give_tree

EXTRA = "_extra_state"

_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_METHODS = frozenset({"state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict"})
_NONE: dict[int, object] = {}


class ModuleState(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """``entries``: name → tensor or extra state. ``metadata``: what a module with hooks wants to see when loading."""

    entries: dict[str, Any]
    metadata: Any = None


class Entry(msgspec.Struct, frozen=True):
    """One entry of a module's state: the ``key`` of its ``owner``; ``tensor`` is None for extra state."""

    owner: nn.Module
    key: str
    tensor: torch.Tensor | None


Owner = tuple[str, str, nn.Module]
"""A module of a tree, unwrapped; before it, its prefix and the one that torch itself would use."""


def unwrapped(module: nn.Module) -> tuple[nn.Module, str]:
    """The module that *module* wraps, or itself; and the prefix that the wrappers put before its names."""
    prefix = ""
    while (attribute := _wraps_under(module)) is not None:
        prefix += f"{attribute}."
        module = getattr(module, attribute)
    return module, prefix


def _wraps_under(module: nn.Module) -> str | None:
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    if flat.is_wrapper(module):
        return flat.WRAPPED
    # where torch._dynamo was never imported, which takes seconds, nothing is compiled
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else None


def walk(module: nn.Module) -> list[Owner]:
    """Every module of the tree, in the order of its ``state_dict``."""
    found: list[Owner] = []
    _walk(module, "", "", _wrappers(), found)
    return found


def _walk(module: nn.Module, prefix: str, raw: str, wrappers: tuple[type, ...], found: list[Owner]) -> None:
    if isinstance(module, wrappers):
        module, wrapping = unwrapped(module)
        raw += wrapping
    found.append((prefix, raw, module))
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{prefix}{name}.", f"{raw}{name}.", wrappers, found)


def _wrappers() -> tuple[type, ...]:
    """The classes that `_wraps_under` may know: asked once for a whole tree."""
    known = [flat.wrapper(), getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)]
    return (nn.parallel.DistributedDataParallel, nn.DataParallel, *(kind for kind in known if kind is not None))


def parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by name, tied ones under each of their names."""
    for prefix, _, owner in walk(module):
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield prefix + key, parameter


def entries(module: nn.Module) -> dict[str, Entry]:
    """What is saved of *module*, in the order of its ``state_dict``."""
    return _entries(walk(module))


def _entries(owners: list[Owner]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for prefix, _, owner in owners:
        for key, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and key not in owner._non_persistent_buffers_set:
                found[prefix + key] = Entry(owner, key, flat.whole(tensor))
        if type(owner).get_extra_state is not nn.Module.get_extra_state:
            found[prefix + EXTRA] = Entry(owner, EXTRA, None)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether some module of the tree has a say of its own in saving or loading."""
    return _have_own_way(walk(module))


def _have_own_way(owners: list[Owner]) -> bool:
    modules = [owner for _, _, owner in owners]
    # a class is asked once, however many modules of it there are
    return any(map(_overrides, set(map(type, modules)))) or any(map(_has_own_way, modules))


def _has_own_way(owner: nn.Module) -> bool:
    hooks = [hook for name in _HOOKS for hook in (getattr(owner, name, None) or _NONE).values()]
    return not _METHODS.isdisjoint(vars(owner)) or not all(map(is_of_fsdp2, hooks))


def _overrides(kind: type[nn.Module]) -> bool:
    """Whether a class has a method of its own; torch's overrides (BatchNorm) only serve files of old versions."""
    methods = [(name, getattr(kind, name)) for name in _METHODS]
    return not all(
        method is getattr(nn.Module, name) or method.__module__.startswith("torch.nn.modules.")
        for name, method in methods
    )


def capture(module: nn.Module, collector: Collector) -> dict[str, Any]:
    """The state of *module*. Calls nothing of it but ``get_extra_state``, or ``state_dict`` if it has hooks."""
    owners = walk(module)
    if _have_own_way(owners):
        return _capture_through_hooks(module, collector)
    known = _entries(owners)
    names = _take_all(known, collector)
    if names is not None:
        return {"entries": Ready(dict(zip(known, map(tensor_tree, names), strict=True)))}
    found: dict[str, object] = {}
    for name, entry in known.items():
        if entry.tensor is None:
            found[name] = entry.owner.get_extra_state()
        else:
            path = f"{collector.component}.{name}"
            found[name] = collector.tensor(name, entry.tensor, path, anchored=True)
    return {"entries": found}


def _take_all(known: Mapping[str, Entry], collector: Collector) -> list[str] | None:
    """All tensors at once, where there is nothing special about any, and no extra state."""
    if not are_plain_keys(known.keys()):
        return None
    return collector.take_all(known, [entry.tensor for entry in known.values()], anchored=True)


def _capture_through_hooks(module: nn.Module, collector: Collector) -> dict[str, Any]:
    _check_materialised(module, collector.component)
    state, clean = _state_dict(module)
    found = {
        clean[raw]: collector.tensor(clean[raw], value, f"{collector.component}.{clean[raw]}")
        if isinstance(value, torch.Tensor)
        else value
        for raw, value in state.items()
    }
    return {"entries": found, "metadata": getattr(state, "_metadata", None)}


def _check_materialised(module: nn.Module, component: str) -> None:
    """Refuse lazy and meta parameters before anything is asked of a module with hooks."""
    for name, entry in entries(module).items():
        if entry.tensor is not None:
            check_savable(entry.tensor, f"{component}.{name}")


def _state_dict(module: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The ``state_dict`` of *module*, unwrapped; and its keys → names without the prefixes of wrappers further in."""
    state: dict[str, Any] = unwrapped(module)[0].state_dict()
    outer = unwrapped(module)[1]
    prefixes = {raw.removeprefix(outer): prefix for prefix, raw, _ in walk(module)}
    return state, {key: _clean(key, prefixes) for key in state}


def _clean(key: str, prefixes: Mapping[str, str]) -> str:
    """*key* with the longest prefix that is a module's replaced by that module's own."""
    end = len(key)
    while end > 0:
        end = key.rfind(".", 0, end)
        if key[: end + 1] in prefixes:
            return prefixes[key[: end + 1]] + key[end + 1 :]
    return key


def prepare(module: nn.Module, stored: Stored, filling: Filling) -> None:
    """Compare names, shapes and dtypes, and place every tensor in the live one."""
    saved = stored.read(ModuleState)
    if has_hooks(module):
        _prepare_through_hooks(module, saved, stored, filling)
        return
    live = entries(module)
    compare_names(stored.name, _not_tied(live, saved), list(saved.entries), filling)
    steps: list[Give] = []
    for name, entry in live.items():
        if name not in saved.entries:
            continue
        value = saved.entries[name]
        if entry.tensor is None:
            steps.append(_extra(entry.owner, give_tree(None, value, stored, filling)))
        elif (give := _placed(name, value, entry.tensor, stored, filling)) is not None:
            steps.append(give)
    filling.later(Phase.MODULES, lambda: _take(steps))


def _not_tied(live: Mapping[str, Entry], saved: ModuleState) -> list[str]:
    """The names of *live*, without those that are only further names of a parameter that was saved under another."""
    filled = {id(entry.tensor) for name, entry in live.items() if entry.tensor is not None and name in saved.entries}
    return [name for name, entry in live.items() if name in saved.entries or id(entry.tensor) not in filled]


def _extra(owner: nn.Module, give: Give) -> Give:
    return lambda: owner.set_extra_state(give())


def _take(steps: list[Give]) -> None:
    for step in steps:
        step()


def _placed(name: str, value: object, live: torch.Tensor, stored: Stored, filling: Filling) -> GiveTensor | None:
    where = f"{stored.name}: {name}"
    if not isinstance(value, TensorRef):
        filling.differences.fatal(where, live=describe(live), checkpoint=f"a {type(value).__name__}")
        return None
    if not stored.agrees(value, live):
        filling.differences.resized(where, live=describe(live), checkpoint=stored.describe(value))
        return None
    give = filling.place(stored, value, live)
    if give is None:
        filling.differences.fatal(
            where, live="a tensor tied to another one of the state", checkpoint="other values for each of the two"
        )
    return give


def compare_names(component: str, live: list[str], saved: list[str], filling: Filling) -> None:
    """Note what only one side has, in its order."""
    known, found = set(live), set(saved)
    for name in live:
        if name not in found:
            filling.differences.missing(component, name)
    for name in saved:
        if name not in known:
            filling.differences.unexpected(component, name)


def _prepare_through_hooks(module: nn.Module, saved: ModuleState, stored: Stored, filling: Filling) -> None:
    _check_materialised(module, stored.name)
    state, clean = _state_dict(module)
    compare_names(stored.name, list(clean.values()), list(saved.entries), filling)
    gives: dict[str, Give] = {}
    for raw, live in state.items():
        if clean[raw] in saved.entries:
            value = saved.entries[clean[raw]]
            _compare_entry(clean[raw], live, value, stored, filling)
            device = live.device if isinstance(live, torch.Tensor) else None
            seat = fresh(live.dtype, tuple(live.shape), device=live.device, like=live) if is_sharded(live) else None
            gives[raw] = give_tree(seat, value, stored, filling, device=device)

    def load() -> None:
        filled: OrderedDict[str, object] = OrderedDict((raw, give()) for raw, give in gives.items())
        filled._metadata = saved.metadata  # type: ignore[attr-defined]  # where load_state_dict looks for it
        complete = filled.keys() == state.keys()
        give_back(stored.name, lambda: unwrapped(module)[0].load_state_dict(filled, strict=complete))

    filling.later(Phase.MODULES, load)


def _compare_entry(name: str, live: object, value: object, stored: Stored, filling: Filling) -> None:
    if not isinstance(live, torch.Tensor):
        return
    if not isinstance(value, TensorRef):
        found = f"a {type(value).__name__}"
    elif stored.agrees(value, live):
        return
    else:
        found = stored.describe(value)
    filling.differences.resized(f"{stored.name}: {name}", live=describe(live), checkpoint=found)
