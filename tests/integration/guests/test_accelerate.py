"""accelerate: a run that is killed and started again by the same command ends as if nothing had happened."""

from pathlib import Path

import pytest
from killing import contents, differing, kill_and_resume

pytest.importorskip("accelerate")

COMPONENTS = ["model", "optimizer", "scheduler", "loader", "registered", "accelerator", "rng"]


@pytest.mark.timeout(300)
def test_a_killed_run_ends_bit_identical(tmp_path: Path) -> None:
    """Everything that was prepared or registered, killed at various points of a save, within and between epochs."""
    control, killed = kill_and_resume("accelerate_run.py", tmp_path, [61, 78])
    assert contents(control, COMPONENTS)["step"] == 20
    assert differing(control, killed, COMPONENTS) == {61: [], 78: []}


@pytest.mark.timeout(300)
def test_a_killed_run_of_two_ranks_ends_bit_identical(tmp_path: Path) -> None:
    """DDP: every rank has the loader, the losses and the random streams that were its own."""
    control, killed = kill_and_resume("accelerate_run.py", tmp_path, [30], ranks=2)
    found = contents(control, COMPONENTS)
    assert found["step"] == 12
    assert {"registered.rank-00001", "rng.rank-00001"} <= found.keys()
    assert differing(control, killed, COMPONENTS) == {30: []}
