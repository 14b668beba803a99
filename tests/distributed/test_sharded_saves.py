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

SPREADS = ("fsdp", "fsdp1", "hsdp", "tp_fsdp", "ddp")
STEPS = 3

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Facts]]]:
    """One root per spread, saved by four ranks, and what each rank knows about each."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run(folder, 4, _save_all, str(folder))


def _save_all(rank: int, folder: str) -> dict[str, Facts]:
    return {spread: _train_and_save(rank, f"{folder}/{spread}", spread) for spread in SPREADS}


def _train_and_save(rank: int, root: str, spread: str) -> Facts:
    state = state_of(spread)
    torch.manual_seed(100 + rank)
    with CheckpointManager(root, state) as manager:
        for number in range(STEPS):
            step(state, spread, number)
        checkpoint = manager.save(STEPS).result()
        streams = torch.rand(2).tolist()
        before = facts(state)
        step(state, spread, STEPS)
    return {"saved": before, "after": facts(state), "streams": streams, "world_size": checkpoint.world_size}


def _restore_all(rank: int, folder: str, others: list[str]) -> dict[str, Facts]:
    return {
        f"{spread} into {other}": _restore_and_train(f"{folder}/{spread}", other)
        for spread in SPREADS
        for other in others
    }


def _restore_and_train(root: str, spread: str) -> Facts:
    state = state_of(spread)
    torch.manual_seed(999)
    with CheckpointManager(root, state) as manager:
        checkpoint = manager.restore()
        assert checkpoint is not None
        assert checkpoint.step == STEPS
        streams = torch.rand(2).tolist()
        restored = facts(state)
        step(state, spread, STEPS)
    return {"restored": restored, "after": facts(state), "streams": streams}


@pytest.mark.parametrize(
    ("world_size", "others"),
    [(4, list(SPREADS)), (2, ["fsdp", "fsdp1", "ddp"]), (3, ["fsdp", "fsdp1"]), (1, ["plain"])],
    ids=["4 ranks", "2 ranks", "3 ranks", "1 process"],
)
@pytest.mark.filterwarnings("ignore:restoring")
def test_any_spread_into_any_other(
    saved: tuple[Path, list[dict[str, Facts]]], tmp_path: Path, world_size: int, others: list[str]
) -> None:
    """Weights, moments and schedule come back exactly; at the same size and spread so does every later step."""
    folder, by_rank = saved
    found = run(tmp_path, world_size, _restore_all, str(folder), others, group=world_size > 1)
    covered = 0
    for rank, results in enumerate(found):
        for name, result in results.items():
            spread, other = name.split(" into ")
            expected = by_rank[0][spread]
            assert expected["world_size"] == 4
            assert result["restored"] == expected["saved"], name
            assert _is_close(result["after"], expected["after"]), name
            if (world_size, spread) == (4, other) and spread != "ddp":  # which sums its first step in another order
                assert result["after"] == expected["after"], name
            if world_size == 4:
                assert result["streams"] == by_rank[rank][spread]["streams"], name
            covered += 1
    assert covered == world_size * len(SPREADS) * len(others)
    for name in found[0]:
        assert len({json.dumps(results[name]["streams"]) for results in found}) == world_size, name


def _is_close(one: Facts, other: Facts) -> bool:
    return all(torch.allclose(torch.tensor(one[name]), torch.tensor(other[name]), rtol=1e-3, atol=1e-5) for name in one)


def _save_and_report(rank: int, root: str) -> list[Any]:
    """A replicated state: what each rank wrote, and that a plain process can read it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(12)))
    with CheckpointManager(root, {"model": model}) as manager:
        manager.save(1, block=True)
    dist.barrier()
    return [path.stat().st_size for path in Path(root).glob("step-*/model*.safetensors") if _rank_of(path) == rank]


def _rank_of(path: Path) -> int:
    return int(path.stem.partition(".rank-")[2] or 0)


def test_replicas_are_written_once_and_by_all(tmp_path: Path) -> None:
    """Each rank writes a quarter, as near as whole tensors allow."""
    sizes = [sum(one) for one in run(tmp_path, 4, _save_and_report, str(tmp_path / "root"))]
    weights = 12 * 256 * 257 * 4
    assert weights < sum(sizes) < 1.05 * weights
    assert max(sizes) < 1.1 * min(sizes)
    torch.manual_seed(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(12)))
    with CheckpointManager(tmp_path / "root", {"model": model}, rng=False) as manager:
        manager.restore()
    torch.manual_seed(0)
    other = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(12)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
