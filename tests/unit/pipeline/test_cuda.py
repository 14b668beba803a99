"""On a CUDA device: what `test_devices.py` shows on a simulated one, with real kernels, memory and optimizers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from ckptman import CheckpointManager, Limits
from ckptman.pipeline.arena import SLOT_NBYTES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def keep_busy(seconds: float = 0.3) -> None:
    """Queue work on the current stream that goes on when this has returned."""
    torch.cuda._sleep(int(seconds * 1e9))


def restored(root: Path, state: dict[str, Any], step: int) -> dict[str, Any]:
    blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with CheckpointManager(root, {"tensors": blank}) as manager:
        assert manager.restore(step) is not None
    return blank


@pytest.mark.parametrize("slots", [1, 2, 100])
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_save_has_what_was_queued_before_it_and_nothing_after(
    tmp_path: Path, slots: int, block: bool, own_stream: bool
) -> None:
    """A chain of matmuls still runs when save is called, updates follow at once, on the default stream or another."""
    torch.manual_seed(0)
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        factor = torch.randn(2048, 2048, device="cuda") / 50
        live = {
            "chain": torch.randn(2048, 2048, device="cuda"),
            "turned": torch.randn(1000, 4099, device="cuda").t(),
            "half": torch.randn(9 << 20, device="cuda", dtype=torch.bfloat16),
            **{f"small.{index}": torch.randn(index + 1, device="cuda") for index in range(50)},
        }
        limits = Limits(host_nbytes=slots * SLOT_NBYTES)
        with CheckpointManager(tmp_path, {"tensors": dict(live)}, limits=limits) as manager:
            for step in (1, 2):
                keep_busy()
                for _ in range(20):
                    live["chain"].copy_(factor @ live["chain"])
                live["half"].mul_(2)
                expected = {name: tensor.clone() for name, tensor in live.items()}
                pending = manager.save(step, block=block)
                for tensor in live.values():
                    tensor.add_(1)
                pending.result(60)
                stream.synchronize()
                found = restored(tmp_path, live, step)
                assert all(torch.equal(found[name], expected[name]) for name in live)


def test_slots_are_page_locked_and_page_aligned(tmp_path: Path) -> None:
    """And no more of them than the budget allows."""
    state = {"x": torch.ones(20 << 20, device="cuda")}
    with CheckpointManager(tmp_path, {"tensors": state}, limits=Limits(host_nbytes=3 * SLOT_NBYTES)) as manager:
        manager.save(1).result(60)
        slots = manager._engine._arena._free
        assert 0 < len(slots) <= 3
        assert all(slot.tensor.is_pinned() and slot.tensor.data_ptr() % 4096 == 0 for slot in slots)


class Run:
    """A model with buffers, a fused AdamW, mixed precision and a scaler."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(512, 1024), torch.nn.BatchNorm1d(1024), torch.nn.Linear(1024, 8)
        ).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        self.state = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = functional.mse_loss(
                self.model(torch.randn(64, 512, device="cuda")).float(), torch.zeros(64, 8).cuda()
            )
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def values(self) -> list[torch.Tensor]:
        """Device tensors, copied behind what is queued."""
        moments = [m for values in self.optimizer.state.values() for m in values.values()]
        return [tensor.detach().clone() for tensor in (*self.model.state_dict().values(), *moments)]


@pytest.mark.parametrize("own_stream", [False, True])
def test_overlapping_saves_of_a_run_are_the_state_at_their_call(tmp_path: Path, own_stream: bool) -> None:
    """Mixed precision, a scaler, a fused optimizer, buffers: twenty saves behind twenty steps, bit for bit."""
    run, expected = Run(), {}
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), CheckpointManager(tmp_path, run.state, overlap=True) as manager:
        run.step()
        for step in range(20):
            keep_busy(0.01)
            manager.save(step)
            expected[step] = run.values()
            run.step()
        manager.wait()
    torch.cuda.synchronize()
    for step in (0, 7, 19):
        other = Run()
        other.step()
        with CheckpointManager(tmp_path, other.state) as manager:
            assert manager.restore(step) is not None
        assert all(torch.equal(a, b) for a, b in zip(other.values(), expected[step], strict=True))


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Scaler, buffers, fused moments and the device's random stream come back."""
    run = Run()
    with CheckpointManager(tmp_path, run.state) as manager:
        run.step()
        manager.save(1, block=True)
    run.step()
    scale = copy.deepcopy(run.scaler.state_dict())
    again = Run()
    with CheckpointManager(tmp_path, again.state) as manager:
        assert manager.restore() is not None
    again.step()
    assert again.scaler.state_dict() == scale
    assert all(torch.equal(a, b) for a, b in zip(run.values(), again.values(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("overlap", [False, True])
def test_several_devices_have_a_stream_each(tmp_path: Path, overlap: bool) -> None:
    """One component has tensors of both, each with work queued on its own current stream."""
    models = torch.nn.ModuleList([torch.nn.Linear(2048, 2048, device=f"cuda:{index}") for index in range(2)])
    optimizer = torch.optim.SGD(models.parameters(), lr=0.1)
    with CheckpointManager(tmp_path, {"model": models, "optimizer": optimizer}, overlap=overlap) as manager:
        for index in range(2):
            with torch.cuda.device(index), torch.no_grad():
                keep_busy()
                models[index].weight.mul_(2)
        expected = [parameter.detach().clone() for parameter in models.parameters()]
        pending = manager.save(1)
        for parameter in models.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        pending.result(60)
        manager.restore()
    assert all(torch.equal(a, b) for a, b in zip(models.parameters(), expected, strict=True))
