"""Lightning: a run that is killed and started again by the same command ends as if nothing had happened."""

from pathlib import Path

import pytest
from killing import contents, differing, kill_and_resume

pytest.importorskip("lightning")

COMPONENTS = ["model", "optimizers", "lr_schedulers", "ckptman", "losses"]


@pytest.mark.timeout(300)
def test_a_killed_run_ends_bit_identical(tmp_path: Path) -> None:
    """Weights, moments, schedule, random streams and losses, killed at two points of a save, in mid-epoch."""
    control, killed = kill_and_resume("lightning_run.py", tmp_path, [60, 117])
    assert contents(control, COMPONENTS)["step"] == 30
    assert differing(control, killed, COMPONENTS) == {60: [], 117: []}


@pytest.mark.timeout(300)
def test_a_killed_run_of_two_ranks_ends_bit_identical(tmp_path: Path) -> None:
    """DDP: rank 0 saves, and each rank's dropout goes on from its own random streams."""
    program = str(Path(__file__).parent / "ddp_lightning.py")
    control, killed = kill_and_resume(program, tmp_path, [40], ranks=2)
    found = contents(control, COMPONENTS)
    assert found["step"] == 15
    assert found["ckptman/streams.0.torch"] != found["ckptman/streams.1.torch"]
    assert differing(control, killed, COMPONENTS) == {40: []}
