"""Small value types that every floor shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A checkpoint that ``restore`` passed over, and why."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """
    A committed checkpoint, as the catalog lists it. Holds no tensors.

    Attributes:
        step: Number of completed training steps.
        created_at: When the save began, in UTC, by the clock of the machine that saved.
        metrics: What was passed to ``save``; may hold NaN and infinities.
        tags: Names given to it. A tagged checkpoint is never pruned.
        nbytes: Bytes of all tensors, borrowed ones included.
        new_nbytes: Bytes of tensors that this checkpoint wrote itself.
        world_size: Number of ranks that saved it.
        components: Names of its components, in the order of the state.
        url: Where it lies; credentials are redacted.
        preempted: Whether it was saved because of a preemption notice.
        values: The plain values of the state. Filled by ``restore`` only.
        skipped: Newer checkpoints that were found damaged. Filled by ``restore`` only.
    """

    step: int
    created_at: datetime
    metrics: Mapping[str, float]
    tags: tuple[str, ...]
    nbytes: int
    new_nbytes: int
    world_size: int
    components: tuple[str, ...]
    url: str
    preempted: bool = False
    values: Mapping[str, object] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
