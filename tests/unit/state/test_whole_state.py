from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from state_roundtrip import begin, fill, frozen, load, save
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckptman.errors import StateMismatch


def build(seed: int) -> dict[str, Any]:
    """One of everything, trained for two steps."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state: dict[str, Any] = {
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        "optimizer": optimizer,
        "ema": AveragedModel(model),
        "model": model,
        "generator": torch.Generator().manual_seed(seed),
        "numpy": np.random.default_rng(seed),
        "history": {"losses": [], "best": torch.zeros(2)},
        "table": np.zeros((3, 500)),
        "tensor": torch.zeros(3),
        "epoch": seed,
    }
    train(state, 2)
    return state


def train(state: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(6, 4, generator=state["generator"]) + float(state["numpy"].normal()) + random.random()
        loss = (state["model"](x) - np.random.rand()).square().mean()
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        state["scheduler"].step()
        state["ema"].update_parameters(state["model"])
        state["history"]["losses"].append(loss.item())
        state["history"]["best"] += loss.item()
        state["table"][0, 0] += loss.item()
        state["tensor"] += loss.item()


def everything(state: dict[str, Any]) -> object:
    """All that there is of *state* and of the global streams."""
    live = [
        live.state_dict() if hasattr(live, "state_dict") else live
        for live in state.values()
        if not isinstance(live, torch.Generator | np.random.Generator)
    ]
    streams = (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state())
    own = (state["generator"].get_state(), state["numpy"].bit_generator.state)
    return frozen([live, streams, own])


def versions(state: dict[str, Any]) -> list[int]:
    tensors = [*state["model"].parameters(), *state["model"].buffers(), state["tensor"], state["history"]["best"]]
    return [tensor._version for tensor in tensors]


@pytest.mark.parametrize("target", ["fresh", "same"])
def test_training_is_what_it_would_have_been(target: str) -> None:
    """Every part of a training run goes on bit for bit, in new objects and in those that have trained on."""
    state = build(1)
    saved = save(state, rng=True)
    train(state, 3)
    expected = everything(state)
    resumed = build(2) if target == "fresh" else state
    assert load(resumed, saved, rng=True) == {"epoch": 1}
    resumed["epoch"] = 1
    train(resumed, 3)
    assert everything(resumed) == expected


def test_a_capture_changes_nothing() -> None:
    """Not one byte, stream, version counter or gradient is another afterwards; leaves share the live memory."""
    state = build(1)
    before, counters = everything(state), versions(state)
    grads = [id(parameter.grad) for parameter in state["model"].parameters()]
    saved = save(state, rng=True)
    assert everything(state) == before
    assert versions(state) == counters
    assert [id(parameter.grad) for parameter in state["model"].parameters()] == grads
    live = {tensor.data_ptr() for tensor in state["model"].state_dict().values()}
    assert {leaf.tensor.data_ptr() for leaf in saved.captured["model"].leaves} == live
    assert list(saved.captured) == [*state, "rng"]


WRONG: list[dict[str, Any]] = [
    {"tensor": torch.zeros(4)},
    {"table": np.zeros(3)},
    {"epoch": []},
    {"more": 1},
    {"generator": np.random.default_rng()},
    {"ema": nn.Linear(4, 8)},
]


def test_preparing_touches_nothing() -> None:
    """Until targets are filled the live state is as it was, whether the checkpoint fits or not."""
    state, other = build(1), build(2)
    saved = save(state, rng=True)
    before, counters = everything(other), versions(other)
    begin(other, saved, rng=True)
    assert everything(other) == before
    for wrong in WRONG:
        with pytest.raises(StateMismatch):
            begin({**other, **wrong}, saved, rng=True)
        assert everything(other) == before
        assert versions(other) == counters


def test_a_part_can_be_restored() -> None:
    """``only`` restores what it names, and reads nothing else."""
    state, other = build(1), build(2)
    saved = save(state, rng=True)
    restoration = begin(other, saved, only=("model", "epoch"), rng=True)
    assert {name.partition("/")[0] for name in restoration.targets} == {"model"}
    optimizer = frozen(other["optimizer"].state_dict())
    stream = torch.get_rng_state()
    fill(restoration, saved)
    assert restoration.finish() == {"epoch": 1}
    assert frozen(other["model"].state_dict()) == frozen(state["model"].state_dict())
    assert frozen(other["optimizer"].state_dict()) == optimizer
    assert torch.equal(torch.get_rng_state(), stream)


def test_targets_are_the_live_tensors() -> None:
    """Wherever a live tensor can be written to, it is the target: no second copy is made."""
    state = build(1)
    saved = save(state)
    restoration = begin(state, saved)
    live = [*state["model"].state_dict().values(), state["tensor"], state["history"]["best"]]
    live += [value for moments in state["optimizer"].state.values() for value in moments.values()]
    places = {tensor.data_ptr() for tensor in live} | {state["table"].ctypes.data}
    copied = [name for name, target in restoration.targets.items() if target.data_ptr() not in places]
    assert all(name.startswith(("ema/", "generator/")) for name in copied)
    assert "generator/state" not in saved.data or "generator/state" in copied
