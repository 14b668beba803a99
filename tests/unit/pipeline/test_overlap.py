"""overlap=True: staging hidden behind training, and never a torn copy, whatever the user does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from ckptman import CheckpointManager, Limits, SaveFailed
from ckptman.pipeline import staging
from ckptman.pipeline.arena import SLOT_NBYTES


class Gate:
    """Holds the copying thread back until it is opened; the thread that trains is never held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        copy = staging._copy_run
        trainer = threading.current_thread()

        def gated(*arguments: Any) -> None:
            if threading.current_thread() is not trainer:
                assert self.open.wait(30)
            copy(*arguments)

        monkeypatch.setattr(staging, "_copy_run", gated)

    def open_soon(self) -> None:
        threading.Timer(0.1, self.open.set).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def training(**settings: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **settings)
    average = torch.optim.swa_utils.AveragedModel(model)
    state = {"model": model, "optimizer": optimizer, "average": average, "seen": torch.zeros(3)}
    forward_backward(state)
    optimizer.step()
    return state


def forward_backward(state: dict[str, Any]) -> None:
    state["optimizer"].zero_grad()
    functional.mse_loss(state["model"](torch.randn(16, 64)), torch.randn(16, 8)).backward()


def copied(state: dict[str, Any]) -> list[torch.Tensor]:
    moments = [m for values in state["optimizer"].state.values() for m in values.values()]
    tensors = [*state["model"].state_dict().values(), *state["average"].state_dict().values(), *moments, state["seen"]]
    return [tensor.detach().clone() for tensor in tensors]


def restored(root: Path, step: int, **settings: Any) -> list[torch.Tensor]:
    state = training(**settings)
    with CheckpointManager(root, state) as manager:
        assert manager.restore(step) is not None
    return copied(state)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str)
def test_what_is_saved_is_what_was_when_save_returned(tmp_path: Path, gate: Gate, settings: dict[str, Any]) -> None:
    """Copying is held back over forward, backward and a change of all that is not the optimizer's; the step waits."""
    state = training(**settings)
    with CheckpointManager(tmp_path, state, overlap=True) as manager:
        pending = manager.save(1)
        expected = copied(state)
        forward_backward(state)  # BatchNorm's running statistics change here
        state["average"].update_parameters(state["model"])
        state["seen"].add_(1)
        torch.manual_seed(99)
        assert not pending.done()
        gate.open_soon()
        state["optimizer"].step()
        assert gate.open.is_set()
        assert pending.stall_s > 0.05  # the step's waiting counts
        pending.result(30)
    assert not same(expected, copied(state))
    assert same(restored(tmp_path, 1, **settings), expected)


def clip(state: dict[str, Any]) -> None:
    with torch.no_grad():
        for parameter in state["model"].parameters():
            parameter.clamp_(-0.01, 0.01)


def load(state: dict[str, Any]) -> None:
    state["model"].load_state_dict({name: tensor + 1 for name, tensor in state["model"].state_dict().items()})


def change_moments(state: dict[str, Any]) -> None:
    for values in state["optimizer"].state.values():
        values["exp_avg"].mul_(2)


def step_by_hand(state: dict[str, Any]) -> None:
    forward_backward(state)
    with torch.no_grad():
        for parameter in state["model"].parameters():
            parameter.sub_(0.1 * parameter.grad)


@pytest.mark.parametrize("change", [clip, load, change_moments, step_by_hand])
@pytest.mark.parametrize("open_first", [True, False], ids=["after-the-copy", "before-the-copy"])
def test_changes_before_the_next_step_fail_loudly_or_are_not_in_the_checkpoint(
    tmp_path: Path, gate: Gate, change: Callable[[dict[str, Any]], None], open_first: bool
) -> None:
    """Whatever moved: SaveFailed naming it and nothing is committed. The next save copies it at once, and works."""
    state = training()
    with CheckpointManager(tmp_path, state, overlap=True) as manager:
        if open_first:
            gate.open.set()
        pending = manager.save(1)
        change(state)
        gate.open.set()
        with pytest.raises(SaveFailed, match=r"tensors were changed.*overlap=False"):
            pending.result(30)
        assert manager.latest() is None
        pending = manager.save(2)
        expected = copied(state)
        change(state)
        pending.result(30)
    assert same(restored(tmp_path, 2), expected)


@pytest.mark.parametrize("how", ["optimizer.load_state_dict", "new tensors"])
def test_what_is_replaced_before_the_copy_is_saved_as_it_was(tmp_path: Path, gate: Gate, how: str) -> None:
    """Other tensors take the place of those that were captured, which nobody changes: the save is right."""
    state = training()
    with CheckpointManager(tmp_path, state, overlap=True) as manager:
        pending = manager.save(1)
        expected = copied(state)
        if how == "new tensors":
            for values in state["optimizer"].state.values():
                values["exp_avg"] = values["exp_avg"] + 1
        else:
            other = training()
            forward_backward(other)
            other["optimizer"].step()
            state["optimizer"].load_state_dict(other["optimizer"].state_dict())
        gate.open.set()
        pending.result(30)
    assert not same(copied(state), expected)
    assert same(restored(tmp_path, 1), expected)


def test_several_optimizers_accumulation_scaler_and_scheduler(tmp_path: Path, gate: Gate) -> None:
    """Any one's step waits; steps that a scaler skips do no harm; the values are those of the call."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(16, 4) for _ in range(2)]
    optimizers = [
        torch.optim.Adam(models[0].parameters()),
        torch.optim.SGD(models[1].parameters(), momentum=0.9, lr=0.1),
    ]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in optimizers]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state: dict[str, Any] = {
        **{f"model{i}": model for i, model in enumerate(models)},
        **{f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)},
        **{f"scheduler{i}": scheduler for i, scheduler in enumerate(schedulers)},
        "scaler": scaler,
    }

    def weights() -> list[torch.Tensor]:
        return [p.detach().clone() for model in models for p in model.parameters()]

    with CheckpointManager(tmp_path, state, overlap=True) as manager:
        for step in range(6):
            pending = manager.save(step)
            expected = weights()
            for _ in range(3):
                for model in models:
                    scaler.scale(model(torch.randn(8, 16)).square().mean()).backward()
            gate.open_soon()
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                if step == 3:
                    next(iter(optimizer.param_groups[0]["params"])).grad.fill_(float("inf"))
                scaler.step(optimizer)
                scheduler.step()
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad()
            assert pending.result(30).step == step
            assert step == 3 or not same(expected, weights())
            now, later = weights(), copied_state(state)
            manager.restore(step)
            assert same(weights(), expected)
            give_back(state, later)
            assert same(weights(), now)
            gate.open.clear()
            gate.open.set()


def copied_state(state: dict[str, Any]) -> dict[str, Any]:
    import copy

    return {name: copy.deepcopy(one.state_dict()) for name, one in state.items()}


def give_back(state: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, one in state.items():
        one.load_state_dict(saved[name])


class Replaced(torch.optim.SGD):
    """An optimizer whose instances step in a way of their own, past torch's hooks."""


def test_an_optimizer_that_does_not_tell_is_copied_at_once(tmp_path: Path, gate: Gate) -> None:
    """Its step was replaced on the instance: the copy is made before save returns, so the gate holds nothing."""
    model = torch.nn.Linear(4, 4)
    optimizer = Replaced(model.parameters(), lr=0.1)

    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)

    optimizer.step = step  # type: ignore[method-assign,assignment]
    with CheckpointManager(tmp_path, {"model": model, "optimizer": optimizer}, overlap=True) as manager:
        before = model.weight.detach().clone()
        pending = manager.save(1)
        optimizer.step()
        assert pending.result(30).step == 1
        manager.restore()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("thread", [False, True], ids=["same thread", "other thread"])
@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_of_an_optimizer_that_is_not_saved_waits_too(
    tmp_path: Path, gate: Gate, other: Callable[..., Any], thread: bool
) -> None:
    """A fused one changes the same parameters, and moves no version counter."""
    state = training()
    forward_backward(state)
    stranger = other(state["model"].parameters(), lr=0.1, fused=True)
    with CheckpointManager(tmp_path, state, overlap=True) as manager:
        pending = manager.save(1)
        expected = copied(state)
        gate.open_soon()
        if thread:
            stepping = threading.Thread(target=stranger.step)
            stepping.start()
            stepping.join()
        else:
            stranger.step()
        assert gate.open.is_set()
        assert not same(copied(state), expected)
        assert pending.result().step == 1
    assert same(restored(tmp_path, 1), expected)


def test_hooks_are_removed_on_close_and_when_the_manager_is_forgotten(tmp_path: Path) -> None:
    """No hook stays on the optimizer; saving adds one and not one per save."""
    state = training()
    hooks = state["optimizer"]._optimizer_step_pre_hooks
    with CheckpointManager(tmp_path / "a", state, overlap=True) as manager:
        for step in range(3):
            manager.save(step)
        assert len(hooks) == 1
    assert not hooks
    manager = CheckpointManager(tmp_path / "b", state, overlap=True)
    manager.save(1).result(30)
    del manager
    import gc

    gc.collect()
    assert not hooks


def test_a_commit_waits_for_the_thread_that_trains_or_for_its_end(tmp_path: Path) -> None:
    """Nobody comes by: nothing is committed, for an operation might be half done. The thread ends: it is committed."""
    state = training()
    manager = CheckpointManager(tmp_path, state, overlap=True)
    reader = CheckpointManager(tmp_path)
    may_end = threading.Event()
    handed: list[Any] = []

    def train() -> None:
        handed.append(manager.save(1))
        assert may_end.wait(30)

    thread = threading.Thread(target=train)
    thread.start()
    while not handed or not handed[0]._deferred._is_staged.is_set():
        pass
    while not list(tmp_path.glob("step-*/manifest.json")):
        pass
    with pytest.raises(TimeoutError):
        handed[0]._future.exception(0.5)  # all is written; a commit would take milliseconds
    assert reader.latest() is None
    may_end.set()
    thread.join(30)
    handed[0]._future.result(30)
    assert reader.latest() is not None
    manager.close()


def test_what_does_not_fit_is_staged_at_once_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a budget of one slot overlap has no effect; the checkpoint is right."""
    state = training()
    with CheckpointManager(tmp_path, state, overlap=True, limits=Limits(host_nbytes=SLOT_NBYTES)) as manager:
        manager.save(1)
        expected = copied(state)
        forward_backward(state)
        state["optimizer"].step()
        manager.wait()
    assert "overlap has no effect" in caplog.text
    assert same(restored(tmp_path, 1), expected)


def test_fifty_overlapping_saves_of_a_run_restore_bit_for_bit(tmp_path: Path) -> None:
    """A real loop, a save behind every step, no gate: every checkpoint is the state at its call."""
    state = training()
    expected = {}
    with CheckpointManager(tmp_path, state, overlap=True, limits=Limits(in_flight=2)) as manager:
        for step in range(50):
            manager.save(step)
            expected[step] = copied(state)
            forward_backward(state)
            state["optimizer"].step()
        manager.wait()
        assert len(manager.checkpoints()) == 50
    assert all(same(restored(tmp_path, step), expected[step]) for step in range(0, 50, 7))
