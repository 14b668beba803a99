"""The state of foreign optimizers: keyed by the names of parameters where the file has them, else by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ckptman.convert.foreign import Document, ForeignTensor, Part, is_optimizer


def with_names(parts: Mapping[str, Part]) -> dict[str, Part]:
    """
    *parts*, where every optimizer that knows the names of its parameters is keyed by them.

    A file knows them that was written by an optimizer made of ``named_parameters()`` (``param_names``), or by
    ``get_optimizer_state_dict``. Any other is left as it is: by position, to be given back by torch's own
    ``load_state_dict``. Nothing is guessed from shapes: two parameters of one shape would get each other's moments.
    """
    modules = {name: _shapes(part) for name, part in parts.items() if _is_module(part)}
    return {
        name: (_named(part.tree, modules) or part) if part.kind == "stateful" and is_optimizer(part.tree) else part
        for name, part in parts.items()
    }


def _is_module(part: Part) -> bool:
    return part.kind == "module" and not isinstance(part.tree, Document)


Shapes = dict[str, tuple[int, ...]]


def _shapes(part: Part) -> Shapes:
    entries = cast("dict[str, Any]", part.tree)["entries"]
    return {name: value.shape for name, value in entries.items() if isinstance(value, ForeignTensor)}


def _named(tree: Any, modules: Mapping[str, Shapes]) -> Part | None:
    names = _names(tree["param_groups"])
    if names is None:
        return None
    owners = [component for component, shapes in modules.items() if shapes.keys() >= set(names.values())]
    if len(owners) != 1 or not tree["state"].keys() <= names.keys():
        return None
    (component,) = owners
    full = {key: f"{component}/{name}" for key, name in names.items()}
    groups = [
        {
            "members": {full[key]: modules[component][names[key]] for key in group["params"]},
            "settings": {key: value for key, value in group.items() if key not in ("params", "param_names")},
        }
        for group in tree["param_groups"]
    ]
    state = {full[key]: value for key, value in tree["state"].items()}
    return Part("optimizer", {"kind": "", "groups": groups, "state": state, "other": {}})


def _names(groups: list[dict[str, Any]]) -> dict[object, str] | None:
    """What the groups call a parameter → its name; None where they do not say, or a name comes twice."""
    found: dict[object, str] = {}
    for group in groups:
        keys = group["params"]
        names = group.get("param_names", keys)
        if not isinstance(names, list) or len(names) != len(keys) or not all(type(name) is str for name in names):
            return None
        found.update(zip(keys, names, strict=True))
    return found if len(set(found.values())) == sum(len(group["params"]) for group in groups) else None


def positional(tree: Any) -> dict[str, Any]:
    """
    The state of an optimizer of ours as ``Optimizer.state_dict`` gives it.

    The names of the parameters are in ``param_names``, without the component, as of an optimizer made of
    ``named_parameters()``.
    """
    numbers: dict[str, int] = {}
    groups = []
    for group in tree["groups"]:
        for name in group["members"]:
            numbers.setdefault(name, len(numbers))
        names = [name.partition("/")[2] for name in group["members"]]
        groups.append(
            {**group["settings"], "params": [numbers[name] for name in group["members"]], "param_names": names}
        )
    state = {numbers[name]: value for name, value in tree["state"].items()}
    return {"state": {**state, **tree.get("other", {})}, "param_groups": groups}


def by_name(tree: Any) -> dict[str, Any]:
    """
    The state of an optimizer of ours as ``get_optimizer_state_dict`` gives it: by name, without the component.

    Where two components own its parameters, and one name is in both, it stays by position.
    """
    names = {name: name.partition("/")[2] for group in tree["groups"] for name in group["members"]}
    if len(set(names.values())) != len(names) or tree.get("other"):
        return positional(tree)
    groups = [{**group["settings"], "params": [names[name] for name in group["members"]]} for group in tree["groups"]]
    return {"state": {names[name]: value for name, value in tree["state"].items()}, "param_groups": groups}
