"""How big a run is. Floors are measured at the same scale, so ratios compare; fixed costs weigh more at a small one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """
    Sizes of everything that is measured.

    Attributes:
        width, layers, vocabulary: Of the GPT-2-like model.
        tensors: How many small ones there are in "many".
        checkpoints: How many the catalog lists.
        commits: How often an empty state is committed.
        save_every_s, block_s: Of the training loop: time between two saves, and how long it trains, with a save and
            without one, to find out what a save costs.
        later_saves: Whose stalls are measured after the first one, in one process.
        pause_s: Before each timed block, after ``sync``.
        repetitions: Of every question that does not say otherwise.
        with_all_rivals: Whether questions that can do without rivals have them.
    """

    name: str
    width: int
    layers: int
    vocabulary: int
    tensors: int
    checkpoints: int
    commits: int
    save_every_s: float
    block_s: float
    later_saves: int
    pause_s: float
    repetitions: int
    with_all_rivals: bool


FULL = Scale(
    name="full",
    width=768,
    layers=12,
    vocabulary=50_257,
    tensors=50_000,
    checkpoints=10_000,
    commits=30,
    save_every_s=60,
    block_s=18,
    later_saves=2,
    pause_s=1.0,
    repetitions=5,
    with_all_rivals=True,
)
QUICK = Scale(
    name="quick",
    width=192,
    layers=8,
    vocabulary=4096,
    tensors=10_000,
    checkpoints=10_000,
    commits=10,
    save_every_s=1.5,
    block_s=3,
    later_saves=2,
    pause_s=0.05,
    repetitions=3,
    with_all_rivals=False,
)
TINY = Scale(
    name="tiny",
    width=32,
    layers=1,
    vocabulary=64,
    tensors=20,
    checkpoints=30,
    commits=2,
    save_every_s=0.1,
    block_s=0.1,
    later_saves=1,
    pause_s=0,
    repetitions=1,
    with_all_rivals=True,
)
SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}
