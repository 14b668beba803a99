"""What several commands print as JSON, piece by piece. Steps are integers, times ISO 8601 in UTC, sizes bytes."""

from __future__ import annotations

import math
from datetime import datetime

from ckptman.format.metrics import metrics_to_json
from ckptman.types import Checkpoint

SCHEMA = 1
"""The version of all documents. It grows when a field is removed or changes its meaning, not when one is added."""


def checkpoint_document(checkpoint: Checkpoint) -> dict[str, object]:
    """*checkpoint* as every listing has it. Metrics that are no JSON number are "nan", "inf" or "-inf"."""
    return {
        "step": checkpoint.step,
        "created_at": time_text(checkpoint.created_at),
        "nbytes": checkpoint.nbytes,
        "new_nbytes": checkpoint.new_nbytes,
        "metrics": metrics_to_json(checkpoint.metrics),
        "tags": list(checkpoint.tags),
        "world_size": checkpoint.world_size,
        "url": checkpoint.url,
    }


def time_text(time: datetime) -> str:
    """*time* (UTC) in ISO 8601, with a Z."""
    return time.isoformat().replace("+00:00", "Z")


def number_json(number: float | None) -> float | str | None:
    """*number*, or its name where JSON has no such number."""
    if number is None or math.isfinite(number):
        return number
    return "nan" if math.isnan(number) else "inf" if number > 0 else "-inf"
