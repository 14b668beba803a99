"""The example of the page, as a user starts it: killed by the system, and started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hugging_face_job import listed

pytest.importorskip("transformers")

HOME = Path(__file__).parents[2]


def start(root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(HOME / "docs" / "examples" / "transformers_run.py"), str(root), "--steps", "16"]
    return subprocess.Popen(
        script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root.parent
    )


def test_the_same_command_line_again_ends_as_if_there_had_been_no_kill(scratch: Path) -> None:
    """Killed from outside once a checkpoint exists, whatever it is doing then: the last line it prints is equal."""
    whole = start(scratch / "whole")
    killed = start(scratch / "killed")
    while killed.poll() is None and not list((scratch / "killed").glob("catalog/*")):
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert len(listed(scratch / "killed")) < 4
    again = start(scratch / "killed")
    lines = [process.communicate()[0].splitlines()[-1] for process in (whole, again)]
    assert lines[0].startswith("done at step 16, best loss ")
    assert lines[0] == lines[1]
