"""accelerate: a run that is killed and started again by the same command ends as if nothing had happened."""

from pathlib import Path

import pytest
from killing import contents, kill_and_resume

pytest.importorskip("accelerate")

COMPONENTS = ["model", "optimizer", "scheduler", "loader", "registered", "accelerator", "rng"]
KILLS = [44, 61, 78]


@pytest.mark.timeout(300)
def test_a_killed_run_ends_bit_identical(tmp_path: Path) -> None:
    """Everything that was prepared or registered, killed at various points of a save, within and between epochs."""
    control, killed = kill_and_resume("accelerate_run.py", tmp_path, KILLS)
    expected = contents(control, COMPONENTS)
    assert expected["step"] == 40
    ended = {kill: contents(root, COMPONENTS) for kill, root in killed.items()}
    assert {kill: [k for k in expected if end[k] != expected[k]] for kill, end in ended.items()} == {
        kill: [] for kill in KILLS
    }
