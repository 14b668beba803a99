"""What does a save cost that has nothing to save?"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from ckptman import CheckpointManager

BOTH = "ckptman"


def commits(place: Place) -> Mapping[str, float]:
    """Empty saves and their fsyncs alone, in turns: both are milliseconds, and a disk's mood lasts longer."""
    root, bare = place.folder / "root", place.folder / "bare"
    (bare / "catalog").mkdir(parents=True)
    (bare / "attempts").mkdir()
    ours: list[float] = []
    floor: list[float] = []
    with CheckpointManager(root, {"nothing": {}}, rng=False) as manager:
        first = system.timed(lambda: manager.save(0, block=True), pause_s=place.pause_s)
        for step in range(1, 1 + place.scale.commits):
            turns: list[Callable[[], None]] = [
                lambda step=step: ours.append(system.timed_now(lambda: manager.save(step, block=True))),
                lambda step=step: floor.append(system.timed_now(lambda: _two_files_three_folders(bare, step))),
            ]
            random.Random(f"{place.repetition} {step}").shuffle(turns)
            for turn in turns:
                turn()
    return {"first_s": first, "seconds": statistics.median(ours), "floor_s": statistics.median(floor)}


def _two_files_three_folders(bare: Path, step: int) -> None:
    for folder in ("attempts", "catalog"):
        with open(bare / folder / str(step), "xb") as file:
            file.write(b"x" * 1024)
            file.flush()
            os.fsync(file.fileno())
        system.fsync(bare / folder)
    system.fsync(bare)


QUESTION = Question(
    name="commit",
    asks="What does a save cost that has nothing to save?",
    contestants={BOTH: Contestant(run=commits)},
    columns=(
        Column(field="seconds", title="commit of an empty state", floors=(BOTH,), floor_field="floor_s"),
        Column(field="floor_s", title="two file fsyncs and three folder fsyncs (floor)", is_plotted=False),
        Column(field="first_s", title="the first one, which also becomes the writer", is_plotted=False),
    ),
    targets=(
        Target(
            label="commit of an empty state", contestant=BOTH, field="seconds", kind="ratio", limit=3, floor=(BOTH,),
            floor_field="floor_s",
        ),
    ),
)  # fmt: skip
