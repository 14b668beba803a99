"""Checkpoints of Lightning: a file of ``torch.save`` with keys of its own."""

from __future__ import annotations

from typing import Any

from ckptman.convert.foreign import Foreign, Part, as_kind, guessed
from ckptman.errors import FormatError

_VERSION = "pytorch-lightning_version"
_LISTS = {"optimizer_states": "optimizer", "lr_schedulers": "scheduler"}


def is_checkpoint(tree: Any) -> bool:
    """Whether *tree* is what Lightning saves."""
    return isinstance(tree, dict) and tree.keys() >= {_VERSION, "state_dict"}


def parts_of(tree: Any) -> Foreign:
    """
    The components of the checkpoint *tree*: ``model``, ``optimizer``, ``scheduler`` (further ones ``optimizer-1``, …),
    and ``lightning``, a dict of all else: epoch, loops, callbacks, hyperparameters.

    Raises:
        FormatError: It is not as Lightning makes it.
    """
    step = tree.get("global_step")
    if type(step) is not int or step < 0 or not isinstance(tree["state_dict"], dict):
        raise FormatError("it is no whole checkpoint of Lightning: global_step or state_dict is missing")
    parts: dict[str, Part] = {"model": as_kind(tree["state_dict"], "module")}
    for key, name in _LISTS.items():
        for index, state in enumerate(tree.get(key) or []):
            parts[numbered(name, index)] = as_kind(state, "stateful")
    rest = {key: value for key, value in tree.items() if key != "state_dict" and key not in _LISTS}
    parts["lightning"] = guessed(rest)
    return Foreign(format="a checkpoint of Lightning", parts=parts, step=step)


def numbered(name: str, index: int) -> str:
    """The first is called *name*, others ``name-1``, ``name-2``, …"""
    return f"{name}-{index}" if index else name
