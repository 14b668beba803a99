"""ignite: a run that is killed and started again by the same command ends as if nothing had happened."""

from pathlib import Path

import pytest
from killing import contents, differing, kill_and_resume

pytest.importorskip("ignite")

COMPONENTS = ["model", "optimizer", "scheduler", "loader", "trainer", "losses", "checkpointer", "rng"]


@pytest.mark.timeout(300)
def test_a_killed_run_ends_bit_identical(tmp_path: Path) -> None:
    """Everything that was to be saved, killed at various points of a save, within and between epochs."""
    control, killed = kill_and_resume("ignite_run.py", tmp_path, [47, 99])
    assert contents(control, COMPONENTS)["step"] == 40
    assert differing(control, killed, COMPONENTS) == {47: [], 99: []}
