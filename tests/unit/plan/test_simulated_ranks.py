"""What 5,000 tensors on many ranks cost rank 0, simulated: the target, and that it grows linearly."""

from __future__ import annotations

import gc

from benchmarks.planning import simulate


def test_planning_is_fast_and_grows_with_the_number_of_ranks() -> None:
    """CPU time for a plan, and for all that every save makes of the manifest: below 1 s for 64 ranks on an idle core."""
    gc.collect()
    few, many = simulate(5000, 16), simulate(5000, 64)
    steps = ("join_s", "write_s", "read_s")
    assert many["chunks"] == 4 * few["chunks"] == 320_000
    assert many["plan_s"] < 3  # 0.6 s on an idle core
    assert sum(many[step] for step in steps) < 3  # 0.4 s
    for step in ("plan_s", "read_s"):
        assert many[step] < 10 * max(few[step], 0.02)
    assert many["manifest_bytes_per_chunk"] < 25
