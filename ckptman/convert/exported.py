"""What an export is asked for, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckptman.types import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """
    What an export did.

    Attributes:
        checkpoint: What was exported.
        path: Where it lies.
        nbytes: Bytes of the files.
        components: Those that it holds.
        left_out: What it does not hold, one sentence each.
    """

    checkpoint: Checkpoint
    path: Path
    nbytes: int
    components: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an export is asked for, besides the checkpoint: see `export_checkpoint`."""

    config: Path | None
    shard_nbytes: int
