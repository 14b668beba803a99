"""Metrics: numbers of any library in, finite JSON numbers or three words out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ckptman.format.metrics import check_metrics, metrics_from_json, metrics_to_json


def test_metrics_come_back() -> None:
    """NaN and infinities too; whatever has ``__float__`` is a number."""
    given = {"a": 1, "b": 0.1, "c": math.inf, "d": -math.inf, "e": math.nan, "f": np.float32(0.5), "g": np.array(2.0)}
    encoded = metrics_to_json(given)
    check_metrics(encoded)
    back = metrics_from_json(encoded)
    assert repr(back) == "{'a': 1.0, 'b': 0.1, 'c': inf, 'd': -inf, 'e': nan, 'f': 0.5, 'g': 2.0}"
    assert {type(value) for value in back.values()} == {float}


@pytest.mark.parametrize("value", ["1", b"1", None, [1.0], 1j, np.zeros(2), 10**400, {}])
def test_what_is_not_one_number_is_refused(value: object) -> None:
    """The message names the metric."""
    with pytest.raises(TypeError, match="metric 'loss'"):
        metrics_to_json({"loss": value})  # type: ignore[dict-item]


def test_limits() -> None:
    """At most 1,000 metrics, in and out; no number that JSON cannot say."""
    many = {f"m{index}": 0.0 for index in range(1001)}
    for refuse in (metrics_to_json, check_metrics):
        with pytest.raises(ValueError, match="at most 1000"):
            refuse(many)  # type: ignore[operator]
    with pytest.raises(ValueError, match="JSON cannot say"):
        check_metrics({"loss": math.nan})
