"""The whole under a real torchrun, with the store that its agent keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ckptman import CheckpointManager

JOB = Path(__file__).with_name("torchrun_job.py")
RESTARTED = Path(__file__).with_name("restarted_job.py")


def test_a_job_of_torchrun_saves_and_restores(tmp_path: Path) -> None:
    """FSDP2 into DDP, on two ranks; each stages its own half and no more."""
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", JOB, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert all((one["step"], one["equal"]) == (3, True) for one in found)
    for one in found:
        assert len(one["staged"]) == 3
        headers = 4 * 4096  # three files, and what is not split evenly
        assert max(one["staged"]) < one["nbytes"] / 2 + headers


def test_a_job_that_torchrun_starts_again_goes_on_where_it_was(tmp_path: Path) -> None:
    """
    A rank is killed in the middle of a save: the survivor, which gets SIGTERM, leaves in time; the second life ends
    with the same bits.

    The variable is what clusters.md asks for: without it torch 2.13's own groups often do not come up again.
    """
    root, out = tmp_path / "root", tmp_path / "out"
    out.mkdir()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    ended = subprocess.run(
        [sys.executable, *command, RESTARTED, root, out],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not (out / "life-0-1").exists()
    survivor = json.loads((out / "life-0-0").read_text())
    assert survivor["begun"] == 0
    assert survivor["left after"] < 15
    assert [json.loads((out / f"life-1-{rank}").read_text())["begun"] for rank in range(2)] == [2, 2]
    assert [json.loads((out / f"end-{rank}").read_text()) for rank in range(2)] == [True, True]
    with CheckpointManager(root) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 2, 3, 4, 5, 6]
