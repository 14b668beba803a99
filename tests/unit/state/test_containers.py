from __future__ import annotations

import copy
import time
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_roundtrip import begin, load, save

from ckptman.errors import StateMismatch
from ckptman.state.capture import capture


def test_identity_is_kept_wherever_possible() -> None:
    """Containers at any depth, tensors and arrays that agree: the same objects with the saved content."""
    state: dict[str, Any] = {
        "list": [1, {"deep": torch.ones(2)}],
        "array": np.arange(1000.0),
        "small": np.arange(3),
        "old": torch.ones(3),
        "deque": deque([1, 2], 5),
        "set": {1, 2},
        "tuple": (torch.ones(1), [1]),
    }
    saved = save({"d": state})
    live: dict[str, Any] = {
        "extra": 1,
        "tuple": (torch.zeros(1), []),
        "set": {9},
        "deque": deque(maxlen=5),
        "old": torch.zeros(4),
        "small": np.zeros(3, dtype=state["small"].dtype),
        "array": np.zeros(1000),
        "list": [7, {"deep": torch.zeros(2)}, 8],
    }
    parts = [live["list"], live["list"][1], live["list"][1]["deep"], live["array"], live["small"], live["deque"]]
    parts += [live["set"], *live["tuple"]]
    old = live["old"]
    load({"d": live}, saved)
    assert list(live) == list(state)
    now = [live["list"], live["list"][1], live["list"][1]["deep"], live["array"], live["small"], live["deque"]]
    now += [live["set"], *live["tuple"]]
    assert all(one is other for one, other in zip(parts, now, strict=True))
    assert live["list"] == [1, {"deep": live["list"][1]["deep"]}]
    assert (live["deque"], live["set"], live["tuple"][1]) == (deque([1, 2]), {1, 2}, [1])
    assert live["old"] is not old
    assert torch.equal(live["old"], state["old"])
    assert np.array_equal(live["array"], state["array"])


def test_places_that_are_one_hold_only_one_content() -> None:
    """Where the live state shares a list or tensor between places with different saved contents, one is made new."""
    shared_list: list[int] = []
    shared = torch.zeros(2)
    live = {"a": shared_list, "b": shared_list, "s": shared, "t": shared}
    load({"d": live}, save({"d": {"a": [1], "b": [2], "s": torch.ones(2), "t": torch.full((2,), 2.0)}}))
    assert (live["a"], live["b"], live["s"].tolist(), live["t"].tolist()) == ([1], [2], [1, 1], [2, 2])
    assert live["a"] is shared_list
    assert live["s"] is shared
    same = torch.ones(2)
    live = {"a": shared_list, "b": shared_list, "s": shared, "t": shared}
    load({"d": live}, save({"d": {"a": [3], "b": [3], "s": same, "t": same}}))
    assert live["a"] is live["b"] is shared_list
    assert live["s"] is live["t"] is shared


def test_a_tensor_in_two_places_is_one_again() -> None:
    """Also where nothing was there before; and two live tensors both get its values."""
    same = torch.arange(4.0)
    saved = save({"d": {"s": same, "t": same, "view": same[1:]}})
    assert set(saved.data) == {"d/s", "d/view"}
    live: dict[str, Any] = {}
    load({"d": live}, saved)
    assert live["s"] is live["t"]
    live = {"s": torch.zeros(4), "t": torch.zeros(4)}
    before = live["s"], live["t"]
    load({"d": live}, saved)
    assert before[0] is live["s"]
    assert before[1] is live["t"]
    assert live["s"].tolist() == live["t"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "array", [np.arange(3.0), np.arange(3000.0), np.array(5), np.arange(3000)[::-1], np.arange(2000, dtype=">f4")]
)
def test_arrays_are_filled_in_place(array: np.ndarray) -> None:
    """As components; another dtype, another shape and a read-only array are differences."""
    live = np.zeros_like(array)
    saved = save({"a": array})
    load({"a": live}, saved)
    assert np.array_equal(live, array)
    flipped = np.zeros_like(array)[..., ::-1] if array.ndim else live
    load({"a": flipped}, saved)
    assert np.array_equal(flipped, array)
    with pytest.raises(StateMismatch, match="expected a"):
        begin({"a": np.zeros(array.shape, dtype=np.int8)}, saved)
    with pytest.raises(StateMismatch):
        begin({"a": np.zeros((1, *array.shape), dtype=array.dtype)}, saved)
    live.flags.writeable = False
    with pytest.raises(StateMismatch, match="read-only"):
        begin({"a": live}, saved)


def test_a_container_of_another_type_does_not_fit() -> None:
    """A list does not become a dict, and a deque keeps its length."""
    for live in ([], OrderedDict(), deque(maxlen=3)):
        with pytest.raises(StateMismatch):
            begin({"d": live}, save({"d": deque([1], 2)}))


def test_plain_values_are_handed_over() -> None:
    """They come back by name, in their types, whatever is in their place now."""
    state = {"n": 3, "pair": (1, torch.ones(2)), "none": None, "text": "x"}
    values = load({"n": None, "pair": 0, "none": 1, "text": 2}, save(state))
    assert list(values) == list(state)
    assert (values["n"], values["none"], values["text"]) == (3, None, "x")
    assert isinstance(values["pair"], tuple)


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
)
KEYS = st.text(max_size=4) | st.integers(-5, 5) | st.booleans() | st.none()
LEAVES = (
    SCALARS
    | st.builds(
        lambda size, dtype: torch.arange(size).to(dtype),
        st.integers(0, 5),
        st.sampled_from([torch.float32, torch.int16, torch.bool, torch.bfloat16]),
    )
    | st.builds(lambda size: np.arange(size, dtype=np.float64), st.sampled_from([0, 3, 600]))
)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(KEYS, children, max_size=4)
    lists = st.lists(children, max_size=4)
    return (
        dicts
        | lists
        | lists.map(tuple)
        | lists.map(lambda items: deque(items, 6))
        | dicts.map(OrderedDict)
        | st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter)
        | st.sets(st.integers() | st.text(max_size=3), max_size=3)
    )


STATES = st.dictionaries(KEYS, st.recursive(LEAVES, containers, max_leaves=12), max_size=5)


def same(one: Any, other: Any) -> bool:
    """Equal in types, orders and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return [(type(k), k) for k in one] == [(type(k), k) for k in other] and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple | deque):
        maxlen = getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
        return maxlen and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(state=STATES, live=STATES)
def test_any_state_comes_back_into_any_other(state: dict[Any, Any], live: dict[Any, Any]) -> None:
    """Whatever the live dict holds, it ends up with exactly what was saved, and the saved one is not touched."""
    original = copy.deepcopy(state)
    saved = save({"d": state})
    assert same(state, original)
    target = live
    load({"d": target}, saved)
    assert target is live
    assert same(target, original)
    load({"d": target}, saved)
    assert same(target, original)


def test_very_many_empty_tensors_are_no_ties() -> None:
    """They have no address to be told apart by: 20,000 are captured in linear time, each under its own name."""
    state = {"empty": {str(index): torch.empty(0, 3) for index in range(20_000)}}
    began = time.thread_time()
    captured = capture(state, rng=False)["empty"]
    assert time.thread_time() - began < 10
    assert len(captured.leaves) == 20_000
    assert not captured.aliases


@pytest.mark.parametrize("key", ["plain", "it's", 'say "so"', "a[0]", "']['", ".dot", "a.b", 7, ("t", 1)], ids=repr)
def test_names_of_tensors_are_unique_and_speak(key: object) -> None:
    """Whatever the keys are called, two tensors get two names, each with its component before it."""
    state = {"box": {key: {"inner": [torch.ones(1), torch.ones(1)]}, "other": torch.ones(2)}}
    names = [leaf.name for leaf in capture(state, rng=False)["box"].leaves]
    assert len(set(names)) == 3
    assert all(name.startswith("box/") and len(name) > len("box/") for name in names)
    if key == "plain":
        assert names == ["box/plain.inner.0", "box/plain.inner.1", "box/other"]
