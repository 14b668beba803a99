"""A loop in the style of torchtitan, by the plain API: killed and started again, it ends as if nothing had happened."""

from pathlib import Path

import pytest
from killing import contents, differing, kill_and_resume

COMPONENTS = [
    *("model-0", "model-1", "optimizer-0", "optimizer-1", "schedule-0", "schedule-1"),
    *("loader", "train_state", "rng"),
]


@pytest.mark.timeout(300)
def test_a_killed_run_ends_bit_identical(tmp_path: Path) -> None:
    """Two model parts with an optimizer and a schedule each, a loader in mid-epoch, and the trainer's own state."""
    control, killed = kill_and_resume("torchtitan_style_run.py", tmp_path, [41])
    assert contents(control, COMPONENTS)["step"] == 40
    assert differing(control, killed, COMPONENTS) == {41: []}
