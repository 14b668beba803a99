"""Ranks that leave: the one with the store before the others, and one whose block ended because another died."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deadly_storage import Deadly
from fleet import free_port, run

from ckptman import CheckpointManager
from ckptman.coordination.torch_board import PrefixStore, lives_in_rank_0
from ckptman.coordinator import FAREWELL_S, TorchCoordinator

JOB = Path(__file__).with_name("leaving_job.py")


def _late(rank: int) -> list[Any]:
    ranks = TorchCoordinator()
    ranks.agree(b"all here")
    if rank:
        time.sleep(1.5)  # rank 0 is long at its end
    told = ranks.broadcast(b"the last word" if rank == 0 else None).decode()
    began = time.monotonic()
    ranks.close()
    return [told, time.monotonic() - began]


def test_rank_0_stays_with_its_store_until_the_others_have_left(tmp_path: Path) -> None:
    """What it said last is read by ranks that come later, though its process ends right after its close."""
    found = run(tmp_path, 3, _late, tcp=True)
    assert [told for told, _ in found] == ["the last word"] * 3
    assert 1.0 < found[0][1] < FAREWELL_S
    assert max(seconds for _, seconds in found[1:]) < 1.0


def test_rank_0_stays_for_nobody_where_the_store_outlives_it(tmp_path: Path) -> None:
    assert max(seconds for _, seconds in run(tmp_path, 3, _late)) < 1.0


def _never_leaves(rank: int) -> float:
    ranks = TorchCoordinator()
    ranks.agree(b"all here")
    began = time.monotonic()
    if rank == 0:
        ranks.close()
    dist.barrier()
    return time.monotonic() - began


def test_rank_0_does_not_stay_for_ever(tmp_path: Path) -> None:
    first, _ = run(tmp_path, 2, _never_leaves, tcp=True)
    assert FAREWELL_S <= first < FAREWELL_S + 3


def test_a_job_without_torchrun_ends_well_though_nobody_closes() -> None:
    """Rank 0 has said its last word, and its interpreter ends, while rank 1 has yet to ask for it."""
    port = str(free_port())
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, str(JOB)],
            env={**os.environ, **place, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(child.communicate(timeout=100)[1], child.returncode) for child in children]
    assert [code for _, code in ended] == [0, 0], ended


def test_whose_store_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tcp = dist.TCPStore("127.0.0.1", 0, is_master=True)
    assert lives_in_rank_0(PrefixStore("a", PrefixStore("b", tcp)), {})
    assert lives_in_rank_0(tcp, {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not lives_in_rank_0(tcp, {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert not lives_in_rank_0(PrefixStore("a", dist.HashStore()), {})


def _block_ends(rank: int, root: str) -> float:
    storage = Deadly(root)
    storage.moment = "writing" if rank == 1 else "never"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="peer"), CheckpointManager(storage, {"w": torch.ones(1000)}) as manager:
        manager.save(1)
        began = time.monotonic()
        while True:
            dist.all_reduce(torch.ones(1))
    return time.monotonic() - began


def test_a_block_that_ends_by_an_error_is_left_soon_though_its_save_waits_for_a_dead_rank(tmp_path: Path) -> None:
    """Long before torchrun kills, after 30 s. Else a rank counts as lost after 15 s of silence."""
    first, _, third = run(tmp_path, 3, _block_ends, str(tmp_path / "root"))
    assert max(first, third) < 12
