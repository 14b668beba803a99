"""Replicated data on a distant storage is fetched once per host; damage and failures reach all ranks all the same."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fleet import run
from torch.distributed.fsdp import fully_shard

from ckptman import CheckpointManager, CkptmanError, StorageError
from ckptman.pipeline import spreading
from ckptman.storage.driver import get_each
from ckptman.storage.local import LocalStorage

RANKS = 4
ROWS = 5 << 10
WHOLE_NBYTES = 3 * ROWS * 1024 * 4  # 60 MiB: three tensors of two and a half blocks each
SMALL = 40


class Distant(LocalStorage):
    """Files as if they were across a network, and how much of the data was read of them here."""

    read_nbytes = 16 << 20
    got_nbytes = 0
    fails = False

    def read_into_each(self, key: str, start: int, into: Sequence[memoryview]) -> int:
        return get_each(self.read_into, key, start, into)

    def read_beginning(self, key: str, into: memoryview) -> tuple[int, int]:
        return self.read_into(key, 0, into), self.size(key)

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        if self.fails and len(into) > 1 << 20:
            raise StorageError("the network is down", key=key)
        got = super().read_into(key, start, into)
        if key.endswith(".safetensors"):
            Distant.got_nbytes += got
        return got


def _state(rank: int, value: float) -> dict[str, Any]:
    """Replicated: large, turned, and small tensors; of one's own: shards, and a table that differs between ranks."""
    shards = torch.nn.Linear(1024, 1024)
    fully_shard(shards)
    with torch.no_grad():
        for parameter in shards.parameters():
            parameter.fill_(value)
    return {
        "large": [torch.full((ROWS, 1024), value), torch.full((ROWS, 1024), value + 1)],
        "turned": torch.full((1024, ROWS), value + 2).t(),
        "small": [torch.full((number,), value + number) for number in range(1, SMALL)],
        "shards": shards,
        "mine": {"table": torch.full((1000,), value + rank)},
    }


def _is(state: dict[str, Any], rank: int, value: float) -> bool:
    expected = _state(rank, value)
    pairs = [
        *zip(state["large"], expected["large"], strict=True),
        *zip(state["small"], expected["small"], strict=True),
        (state["turned"], expected["turned"]),
        (state["mine"]["table"], expected["mine"]["table"]),
        *((p.to_local(), q.to_local()) for p, q in zip(
            state["shards"].parameters(), expected["shards"].parameters(), strict=True)),
    ]  # fmt: skip
    return all(torch.equal(one, other) for one, other in pairs)


def _restore_all_ways(rank: int, folder: str) -> dict[str, Any]:
    root = f"{folder}/root"
    with CheckpointManager(root, _state(rank, 1.0), rng=False) as manager:
        manager.save(1, block=True)
    with CheckpointManager(root, _state(rank, 2.0), rng=False) as manager:
        manager.save(2, block=True)
    state = _state(rank, 0.0)
    storage = Distant(root)
    found: dict[str, Any] = {}
    with CheckpointManager(storage, state, rng=False) as manager:
        manager.restore()
        found["restored"] = _is(state, rank, 2.0)
        found["read"] = Distant.got_nbytes

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spreading, "ROUND_NBYTES", 1 << 50)  # more than there is
            manager.restore()
        found["read without memory"] = Distant.got_nbytes - found["read"]

        storage.fails = rank == 2
        with pytest.raises(CkptmanError) as caught:
            manager.restore()
        storage.fails = False
        found["failed"] = [type(caught.value).__name__, str(caught.value)]

        dist.barrier()
        if rank == 0:
            path = _largest(root)
            with path.open("r+b") as file:
                file.seek(-5, os.SEEK_END)
                file.write(b"x")
        dist.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = manager.restore()
        assert checkpoint is not None
        found["walked back"] = [checkpoint.step, [one.reason for one in checkpoint.skipped], _is(state, rank, 1.0)]
    found["left"] = [str(path) for path in Path("/dev/shm").glob(f"ckptman-{os.getpid()}-*")]
    return found


def _largest(root: str) -> Path:
    return max(Path(root).glob("step-000000000002*/large*.safetensors"), key=lambda path: path.stat().st_size)


def test_each_replicated_byte_is_fetched_once_by_a_host(tmp_path: Path) -> None:
    """Every target, turned ones too, gets its bytes; a failure and damage are the same on all ranks."""
    found = run(tmp_path, RANKS, _restore_all_ways, str(tmp_path))
    assert all(one["restored"] for one in found)
    own = 1024 * 1025 * 4 + RANKS * 4000  # of all ranks: shards and tables
    fetched = sum(one["read"] for one in found)
    assert WHOLE_NBYTES + own < fetched < 1.03 * (WHOLE_NBYTES + own), "and headers"
    most = max(one["read"] for one in found)
    assert most < 1.3 * fetched / RANKS, "dealt out evenly"
    assert sum(one["read without memory"] for one in found) > RANKS * WHOLE_NBYTES, "each for itself"
    assert {tuple(one["failed"]) for one in found} == {tuple(found[0]["failed"])}
    assert found[0]["failed"][0] == "StorageError"
    assert "the network is down (on rank 2" in found[0]["failed"][1]
    for one in found:
        step, reasons, is_right = one["walked back"]
        assert (step, is_right) == (1, True)
        assert len(reasons) == 1
        assert "large" in reasons[0]
        assert one["left"] == []
