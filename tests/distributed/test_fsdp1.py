"""What is particular of FSDP1: whole parameters that it keeps for a while, and what of it cannot be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fleet import run
from sharded_models import fsdp1, plain
from torch.distributed.fsdp import FullyShardedDataParallel

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
