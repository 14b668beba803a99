"""Dicts of very many tensors are taken and placed at once: with the same outcome as one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from state_roundtrip import load, save

from ckptman.state import collecting, trees
from ckptman.state.capture import Captured, capture

Tree = dict[str, object]


def tensors(*keys: str) -> Tree:
    return {key: torch.full((3,), float(index)) for index, key in enumerate(keys)}


def tied() -> Tree:
    tree = tensors("a", "b", "c")
    return {**tree, "again": tree["a"]}


def overlapping() -> Tree:
    whole = torch.arange(8.0)
    return {"whole": whole, "half": whole[:4], "rest": whole[4:]}


def beside(name: str) -> Callable[[], Tree]:
    special = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "requires grad": torch.ones(2, requires_grad=True),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
        "sparse": torch.eye(3).to_sparse(),
        "empty": torch.empty(0),
        "strided": torch.ones(4, 4).t()[:, 1:],
        "number": 3,
    }
    return lambda: {**tensors("a", "b"), "c": special[name]}


STATES: dict[str, Callable[[], object]] = {
    "flat": lambda: tensors("a", "b", "c"),
    "nested": lambda: {"outer": {"inner": tensors("a", "b")}, "list": [tensors("a", "b"), tensors("a")]},
    "names that are cut": lambda: tensors(".a", "entries.b", "state.c", "d"),
    "an empty name": lambda: tensors("", "a"),
    "under a name that is cut": lambda: {"state": tensors("state.a", "b"), "entries": {"state": tensors("c", ".d")}},
    "under an empty name": lambda: {"": tensors("a", "state.b")},
    "quotes": lambda: tensors("it's", 'a "b"', "c[0]", "d\\e", "f\ng"),
    "not ASCII": lambda: tensors("größe", "幅"),
    "names that meet": lambda: {"a.b": torch.ones(1), "a": tensors("b", "c")},
    "tied": tied,
    "overlapping": overlapping,
    **{f"beside: {name}": beside(name) for name in ("parameter", "requires grad", "conjugate", "negative", "sparse")},
    **{f"beside: {name}": beside(name) for name in ("empty", "strided", "number")},
}


def flags(tensor: torch.Tensor) -> tuple[bool, ...]:
    return tensor.requires_grad, tensor.is_conj(), tensor.is_neg(), tensor.is_sparse


def outcome(captured: Captured) -> object:
    leaves = [(leaf.name, leaf.tensor.tolist(), *flags(leaf.tensor)) for leaf in captured.leaves]
    return captured.kind, leaves, captured.values, captured.aliases


@pytest.mark.parametrize("name", STATES)
def test_it_makes_no_difference_whether_they_are_taken_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"all": STATES[name]()}
    monkeypatch.setattr(collecting, "_MANY", 1_000)
    one_by_one = outcome(capture(state, rng=False)["all"])
    monkeypatch.setattr(collecting, "_MANY", 1)
    assert outcome(capture(state, rng=False)["all"]) == one_by_one


def changed(tree: object) -> object:
    """*tree* with other values in its tensors."""
    if isinstance(tree, torch.Tensor):
        with torch.no_grad():
            tree.mul_(0)
        return tree
    for one in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        changed(one)
    return tree


def objects(tree: object) -> list[object]:
    """Everything in *tree*, in its order."""
    if isinstance(tree, dict | list):
        return [one for part in (tree.values() if isinstance(tree, dict) else tree) for one in objects(part)]
    return [tree]


def restored(name: str, other: str) -> object:
    """What comes out where *name* is restored into what *other* makes; which of the live objects are in it."""
    saved = save({"all": STATES[name]()})
    live = {"all": changed(STATES[other]())}
    before = objects(live)
    load(live, saved)
    kept = [[place for place, old in enumerate(before) if one is old] for one in objects(live)]
    return outcome(capture(live, rng=False)["all"]), kept


@pytest.mark.parametrize("other", [None, "flat", "tied", "overlapping", "beside: strided", "beside: parameter"])
@pytest.mark.parametrize("name", STATES)
def test_it_makes_no_difference_whether_they_are_placed_at_once(
    name: str, other: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into one like it, and into others: of the same names and with other tensors among them."""
    monkeypatch.setattr(trees, "_MANY", 1_000)
    one_by_one = restored(name, other or name)
    monkeypatch.setattr(trees, "_MANY", 1)
    assert restored(name, other or name) == one_by_one


def test_what_was_taken_shares_memory_and_nothing_else_with_the_live_one() -> None:
    live = torch.zeros(3)
    (leaf,) = (
        one
        for one in capture({"all": {**tensors(*map(str, range(99))), "x": live}}, rng=False)["all"].leaves
        if one.name == "all/x"
    )
    live.fill_(1)
    assert leaf.tensor.tolist() == [1, 1, 1]
    live.data = torch.full((3,), 2.0)
    assert leaf.tensor.tolist() == [1, 1, 1]
