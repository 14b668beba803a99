"""The random streams of a process, as trainers save them and as ckptman does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from ckptman.convert.foreign import ForeignTensor, Part
from ckptman.errors import FormatError

_TORCH = ("torch", "cpu", "torch_manual_seed")
_NUMPY = ("numpy", "numpy_random_seed")
_PYTHON = ("python", "random_state")
_DEVICES = {"cuda": ("cuda", "torch_cuda_manual_seed"), "xpu": ("xpu", "torch_xpu_manual_seed"), "mps": ("mps",)}


def by_rank(pattern: str, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Of the *names*, those of the files of ranks 0, 1, … (*pattern* has ``{}`` for the rank); and which are missing.

    That the last ones are missing cannot be seen.
    """
    before, after = pattern.split("{}")
    numbers = [name[len(before) : len(name) - len(after)] for name in names if name.startswith(before)]
    last = max((int(number) for number in numbers if number.isdecimal() and len(number) < 6), default=0)
    wanted = [pattern.format(rank) for rank in range(last + 1)]
    known = set(names)
    return [name for name in wanted if name in known], [name for name in wanted if name not in known]


def streams_of(trees: Mapping[Path, object]) -> tuple[Part, ...]:
    """The random streams that a trainer wrote, one file for each rank: its path → what is in it. Raises FormatError."""
    parts = {path: streams(tree) for path, tree in trees.items()}
    odd = next((path for path, part in parts.items() if part is None), None)
    if odd is not None:
        raise FormatError(f"{odd} does not hold random streams as the Trainer or accelerate saves them")
    return tuple(part for part in parts.values() if part is not None)


def streams(tree: Any) -> Part | None:
    """
    The component ``rng`` that *tree* is: what Hugging Face's Trainer, accelerate or an export of ours wrote.

    None if it is something else.
    """
    if not isinstance(tree, dict):
        return None
    torch_, numpy, python = (_first(tree, names) for names in (_TORCH, _NUMPY, _PYTHON))
    if not isinstance(torch_, ForeignTensor) or numpy is None or type(python) is not tuple:
        return None
    devices = {name: _states(states) for name, keys in _DEVICES.items() if (states := _first(tree, keys)) is not None}
    if isinstance(tree.get("devices"), dict):
        devices = tree["devices"]
    return Part("rng", {"python": python, "numpy": _numpy(numpy), "torch": torch_, "devices": devices})


def _first(tree: dict[Any, Any], names: tuple[str, ...]) -> Any:
    return next((tree[name] for name in names if name in tree), None)


def _states(states: Any) -> list[Any]:
    return states if isinstance(states, list) else [states]


def _numpy(state: Any) -> dict[str, Any]:
    """NumPy's state as ``get_state(legacy=False)`` gives it."""
    if isinstance(state, dict):
        inner = state.get("state")
        if isinstance(inner, dict) and isinstance(inner.get("key"), ForeignTensor):
            return {**state, "state": {**inner, "key": _array(inner["key"])}}
        return state
    if type(state) is tuple and len(state) == 5:
        name, key, position, has_gauss, gauss = state
        return {
            "bit_generator": name,
            "state": {"key": key, "pos": position},
            "has_gauss": has_gauss,
            "gauss": gauss,
        }
    raise FormatError("the state of NumPy's random stream is not as NumPy gives it")


def _array(tensor: ForeignTensor) -> np.ndarray:
    if tensor.data.nbytes > _MAX_NBYTES:
        raise FormatError("the state of NumPy's random stream is too large to be one")
    data = bytearray(tensor.data.nbytes)
    tensor.data.read_into(0, memoryview(data))
    return cast("np.ndarray", np.frombuffer(data, tensor.dtype).reshape(tensor.shape))


_MAX_NBYTES = 1 << 16
