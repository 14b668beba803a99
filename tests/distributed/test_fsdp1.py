"""What is particular of FSDP1: whole parameters that it keeps for a while, and what of it cannot be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fleet import run
from sharded_models import fsdp1, plain, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

from ckptman import CheckpointManager, UnsupportedState


def _look_first(rank: int, root: str) -> list[Any]:
    """An evaluation leaves the parameters of the outermost module whole, on every rank."""
    model = plain()
    outer = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    inputs = torch.ones(2, 6)
    with torch.no_grad(), CheckpointManager(root, {"model": outer}) as manager:
        before = outer(inputs)
        manager.save(1, block=True)
        for parameter in outer.parameters():
            parameter.mul_(2)
        doubled = outer(inputs)
        manager.restore()
        return [before.tolist(), doubled.tolist(), outer(inputs).tolist()]


def test_parameters_that_an_evaluation_left_whole_are_saved_and_restored(tmp_path: Path) -> None:
    """What is computed next is computed with what was restored."""
    root = tmp_path / "root"
    for before, doubled, after in run(tmp_path, 2, _look_first, str(root)):
        assert before == after != doubled
    model = plain()
    for parameter in model.parameters():
        parameter.data.zero_()
    with CheckpointManager(root, {"model": model}, rng=False) as manager:
        manager.restore()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain().parameters(), strict=True))


def _hidden(rank: int, root: str) -> str:
    model = FullyShardedDataParallel(plain(), device_id=torch.device("cpu"))
    with CheckpointManager(root, {"model": model}) as manager:
        try:
            manager.save(1, block=True)
        except UnsupportedState as error:
            return str(error)
    return "saved"


def test_flattened_parameters_without_names_are_refused(tmp_path: Path) -> None:
    for told in run(tmp_path, 2, _hidden, str(tmp_path / "root")):
        assert "use_orig_params=True" in told


def _frozen(rank: int, root: str) -> list[bool]:
    """A layer that is never trained has no moments on any rank."""
    model = fsdp1()
    model.module[1].requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with CheckpointManager(root, {"model": model, "optimizer": optimizer}, overlap=True) as manager:
        for step in (1, 2):
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            manager.save(step).result()
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        manager.restore()
        return [torch.equal(one, other) for one, other in zip(kept, model.parameters(), strict=True)]


def test_frozen_layers_and_saves_that_overlap_training(tmp_path: Path) -> None:
    """Of the second save the frozen layer is borrowed from the first."""
    for equal in run(tmp_path, 2, _frozen, str(tmp_path / "root")):
        assert all(equal)
        assert len(equal) == 6


def _settings(kind: str) -> dict[str, Any]:
    if kind == "mixed precision":
        return {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)}
    found: dict[str, Any] = {"sharding_strategy": ShardingStrategy[kind]}
    if "HYBRID" in kind:
        found["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return found


def _held(state: dict[str, Any]) -> list[torch.Tensor]:
    """What this rank holds: its parts of the parameters and their moments."""
    parameters = list(state["model"].parameters())
    moments = [value for one in parameters for value in state["optimizer"].state.get(one, {}).values()]
    return [tensor.detach().clone() for tensor in [*parameters, *moments]]


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _strategy(root: str, kind: str) -> tuple[bool, bool]:
    settings = {**_settings(kind), "use_orig_params": True, "device_id": torch.device("cpu")}
    wrap = lambda part: FullyShardedDataParallel(part, **settings)
    model = wrap(torch.nn.Sequential(*map(wrap, plain())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with CheckpointManager(root, state) as manager:
        for number in range(3):
            step(state, "fsdp1", number)
        manager.save(3, block=True)
        saved = _held(state)
        step(state, "fsdp1", 3)
        after = _held(state)
        step(state, "fsdp1", 4)
        manager.restore()
        restored = _held(state)
        step(state, "fsdp1", 3)
        return _equal(restored, saved), _equal(_held(state), after)


KINDS = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2", "SHARD_GRAD_OP", "NO_SHARD", "mixed precision")
INEXACT = ("_HYBRID_SHARD_ZERO2", "SHARD_GRAD_OP")
"""Torch itself takes other steps with these on a CPU once the same parts were written by hand: not judged here."""


def _strategies(rank: int, folder: str) -> dict[str, tuple[bool, bool]]:
    return {kind: _strategy(f"{folder}/{kind}", kind) for kind in KINDS}


def test_every_strategy_comes_back_and_trains_on(tmp_path: Path) -> None:
    """Into itself bit for bit, and into a plain model. CPU offload torch refuses where there is no accelerator."""
    for found in run(tmp_path, 4, _strategies, str(tmp_path)):
        for kind, (is_restored, is_same_later) in found.items():
            assert is_restored, kind
            assert is_same_later or kind in INEXACT, kind
    for kind in KINDS:
        model = plain()
        with CheckpointManager(tmp_path / kind, {"model": model}, rng=False) as manager:
            manager.restore(only=["model"])
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert not any(map(torch.equal, model.parameters(), plain().parameters())), "trained weights"
