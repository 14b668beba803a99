"""The parts of a Trainer's state that are no live torch objects: plain values, taken from it and given back to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from ckptman.errors import UnsupportedState
from ckptman.state.rng import GlobalStreams, put_back, snapshot


class Held:
    """
    A component of values: *read* is asked when a checkpoint is saved; what was restored lies in ``value``.

    The Trainer asks for these parts at different times, some of them later than ckptman restores them.
    """

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read = read
        self.value: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""
        return self._read()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold *state* until it is asked for."""
        self.value = state


def trainer_values(trainer: Trainer) -> dict[str, Any]:
    """
    The ``TrainerState`` with the states of the callbacks, exactly as ``trainer_state.json`` would hold it.

    Raises:
        UnsupportedState: It cannot be written as JSON, which is all that transformers itself would do with it.
    """
    callbacks = [*trainer.callback_handler.callbacks, trainer.control]
    exportable = [one for one in callbacks if isinstance(one, ExportableState)]
    # a fresh TrainerState asks each of them, and makes lists of those of one class
    trainer.state.stateful_callbacks.update(TrainerState(stateful_callbacks=exportable).stateful_callbacks)
    try:
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(trainer.state)))
    except TypeError as error:
        raise UnsupportedState(
            f"cannot save trainer.state: {error}; logs, metrics and the states of callbacks may hold what JSON can say",
            path="trainer.state",
        ) from error
    return values


def rank_values(trainer: Trainer) -> dict[str, Any]:
    """What is this process's own, in plain values: its random streams, and the loss since the last log."""
    loss = getattr(trainer, "_tr_loss", None)
    return {
        "rng": plain_streams(snapshot()),
        "loss": 0.0 if loss is None else loss.item(),
        "logged_at": getattr(trainer, "_globalstep_last_logged", trainer.state.global_step),
    }


def plain_streams(streams: GlobalStreams) -> dict[str, Any]:
    """*streams* in plain values; `put_back_streams` takes them as ``{"rng": …}``."""
    devices = {name: [_plain(state) for state in states] for name, states in streams.devices.items()}
    return msgspec.structs.asdict(msgspec.structs.replace(streams, torch=_plain(streams.torch), devices=devices))


def configs(model: object) -> dict[str, Any]:
    """What an export writes beside the weights of *model*, so that ``from_pretrained`` loads it, if it could at all."""
    if not isinstance(model, PreTrainedModel):
        return {}
    found = {"config.json": json.loads(model.config.to_json_string())}
    if model.can_generate() and model.generation_config is not None:
        found["generation_config.json"] = json.loads(model.generation_config.to_json_string())
    return found


def put_back_streams(values: dict[str, Any]) -> None:
    """Make the random streams of this process continue from what `rank_values` took."""
    streams = msgspec.convert(values["rng"], GlobalStreams)
    devices = {name: [_state(plain) for plain in states] for name, states in streams.devices.items()}
    put_back(msgspec.structs.replace(streams, torch=_state(streams.torch), devices=devices))


def _plain(state: torch.Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _state(plain: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(plain), dtype=torch.uint8)


def put_back_loss(trainer: Trainer, values: dict[str, Any]) -> None:
    """
    Let the next logged loss be the mean over all steps since the last log, those before the resume included.

    The loss that ``train`` returns stays the mean over its own steps: what was put in is taken out there.
    """
    if hasattr(trainer, "_tr_loss"):
        trainer._tr_loss.fill_(values["loss"])
        trainer._total_loss_scalar -= values["loss"]
        trainer._globalstep_last_logged = values["logged_at"]


def metrics_of(state: TrainerState) -> dict[str, float]:
    """The numbers that were logged or evaluated at this very step; they go into the catalog."""
    found: dict[str, float] = {}
    for entry in reversed(state.log_history):
        if entry.get("step") != state.global_step:
            break
        found = {**entry, **found}
    return {
        name: float(value)
        for name, value in found.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
