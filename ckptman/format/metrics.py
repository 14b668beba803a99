"""Metrics in JSON: numbers, and the three that JSON has no number for as the strings "nan", "inf" and "-inf"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from ckptman.format.names import MAX_METRICS, check_metric

JsonMetrics = dict[str, float | Literal["nan", "inf", "-inf"]]


def metrics_to_json(metrics: Mapping[str, float]) -> JsonMetrics:
    """
    Encode *metrics*. Anything with ``__float__`` will do as a value (a 0-dim tensor, a NumPy scalar).

    Raises:
        ValueError: Too many metrics, or a name that `check_metric` refuses.
        TypeError: A value is not a number.
    """
    if len(metrics) > MAX_METRICS:
        raise ValueError(f"at most {MAX_METRICS} metrics, got {len(metrics)}")
    return {check_metric(name): _number(name, value) for name, value in metrics.items()}


def _number(name: str, value: object) -> float | Literal["nan", "inf", "-inf"]:
    if isinstance(value, (str, bytes)):
        raise TypeError(f"metric {name!r} must be a number, got {value!r}")
    try:
        number = float(value)  # type: ignore[arg-type]  # whatever has __float__; the except clause is the check
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"metric {name!r} must be one number, got {type(value).__name__}") from error
    if math.isfinite(number):
        return number
    return "nan" if math.isnan(number) else "inf" if number > 0 else "-inf"


def check_metrics(metrics: JsonMetrics) -> None:
    """Raise ValueError unless *metrics* are what `metrics_to_json` makes."""
    if len(metrics) > MAX_METRICS:
        raise ValueError(f"at most {MAX_METRICS} metrics, got {len(metrics)}")
    for name, value in metrics.items():
        check_metric(name)
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"metric {name!r} is {value}, which JSON cannot say as a number")


def metrics_from_json(metrics: JsonMetrics) -> dict[str, float]:
    """The numbers again."""
    return {name: value if type(value) is float else float(value) for name, value in metrics.items()}
