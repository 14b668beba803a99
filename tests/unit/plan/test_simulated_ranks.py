"""What 5,000 tensors on 64 ranks cost rank 0 at every save, simulated."""

from __future__ import annotations

from benchmarks.planning import plan, simulate


def test_the_manifest_of_many_ranks_is_small_and_fast() -> None:
    """CPU time to join all reports, write the manifest and read it: 0.4 s on an idle core; 23 bytes for each chunk."""
    found = simulate(5000, 64, plans=False)
    assert found["chunks"] == 320_000
    assert found["join_s"] + found["write_s"] + found["read_s"] < 3
    assert found["manifest_bytes_per_chunk"] < 25


def test_planning_takes_time_in_proportion_to_the_ranks() -> None:
    """CPU time of 1,000 tensors: four times the ranks, about four times the time (sixteen times, if it were pairs)."""
    few, many = (min(plan(1000, ranks) for _ in range(3)) for ranks in (16, 64))
    assert many < 12 * few
