"""Sharded saves and restores between real ranks: any way of spreading a state into any other, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fleet import run
from sharded_models import facts, state_of, step

from ckptman import CheckpointManager


def _rank_facts() -> dict[str, Any]:
    """What each rank has of its own: where its random streams are. Draws from them."""
    return {"torch": torch.rand(2).tolist()}


def _train_and_save(rank: int, root: str, spread: str) -> dict[str, Any]:
    state = state_of(spread)
    torch.manual_seed(100 + rank)
    parts = dist.get_world_size()
    with CheckpointManager(root, state) as manager:
        for number in range(3):
            step(state, number, parts=parts, part=rank)
        saved = manager.save(3, block=rank % 2 == 0 and False).result()
        streams = _rank_facts()
        before = facts(state)
        step(state, 3, parts=parts, part=rank)
    return {"saved": before, "after": facts(state), "streams": streams, "world_size": saved.world_size}


def _restore_and_train(rank: int, root: str, spread: str) -> dict[str, Any]:
    state = state_of(spread)
    torch.manual_seed(999)
    parts = dist.get_world_size() if dist.is_initialized() else 1
    with CheckpointManager(root, state) as manager:
        found = manager.restore()
        assert found is not None
        assert found.step == 3
        streams = _rank_facts()
        restored = facts(state)
        step(state, 3, parts=parts, part=rank)
        manager.save(4, block=True)
    return {"restored": restored, "after": facts(state), "streams": streams}


def _close(one: Any, other: Any) -> bool:
    return all(torch.allclose(torch.tensor(one[name]), torch.tensor(other[name]), rtol=1e-4, atol=1e-6) for name in one)


@pytest.mark.parametrize(
    ("spread", "others"),
    [
        ("fsdp", [(4, "fsdp"), (2, "fsdp"), (3, "fsdp"), (1, "plain"), (4, "hsdp"), (4, "tp_fsdp")]),
        ("hsdp", [(4, "hsdp"), (2, "fsdp")]),
        ("tp_fsdp", [(4, "tp_fsdp"), (1, "plain"), (3, "fsdp")]),
        ("ddp", [(4, "ddp"), (2, "fsdp"), (1, "plain")]),
    ],
)
def test_any_spread_into_any_other(tmp_path: Path, spread: str, others: list[tuple[int, str]]) -> None:
    """Weights, moments and schedule come back exactly; at the same size and spread so does every later step."""
    root = tmp_path / "root"
    saved = run(tmp_path, 4, _train_and_save, str(root), spread)
    assert saved[0]["world_size"] == 4
    assert len({json.dumps(one["streams"]) for one in saved}) == 4
    for number, (world_size, other) in enumerate(others):
        copy = tmp_path / f"copy-{number}"
        _copy(root, copy)
        found = run(tmp_path, world_size, _restore_and_train, str(copy), other)
        for one in found:
            assert one["restored"] == saved[0]["saved"], f"{spread} on 4 into {other} on {world_size}"
            assert _close(one["after"], saved[0]["after"])
        if (world_size, other) == (4, spread):
            assert [one["after"] for one in found] == [one["after"] for one in saved]
            assert [one["streams"] for one in found] == [one["streams"] for one in saved]
        elif world_size > 1:
            assert len({json.dumps(one["streams"]) for one in found}) in (world_size, 4)


def _copy(root: Path, copy: Path) -> None:
    import shutil

    shutil.copytree(root, copy)
