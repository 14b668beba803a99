"""The whole under a real torchrun, with the store that its agent keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).with_name("torchrun_job.py")


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
