"""Lightning: a run that is killed and started again by the same command ends as if nothing had happened."""

from pathlib import Path

import pytest
from killing import contents, kill_and_resume

pytest.importorskip("lightning")

COMPONENTS = ["model", "optimizers", "lr_schedulers", "ckptman", "losses"]
KILLS = [3, 60, 117]


@pytest.mark.timeout(300)
def test_a_killed_run_ends_bit_identical(tmp_path: Path) -> None:
    """Weights, moments, schedule, random streams and losses, killed at various points of a save, in mid-epoch."""
    control, killed = kill_and_resume("lightning_run.py", tmp_path, KILLS)
    expected = contents(control, COMPONENTS)
    assert expected["step"] == 30
    assert {kill: contents(root, COMPONENTS) == expected for kill, root in killed.items()} == dict.fromkeys(KILLS, True)
