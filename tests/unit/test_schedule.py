"""`Every`: whichever comes first."""

from __future__ import annotations

import pytest

from ckptman import Every


def test_steps_are_multiples() -> None:
    """``Every(steps=5)`` fires at 5, 10, … and never at 0."""
    assert [step for step in range(21) if Every(steps=5)(step, 1e9)] == [5, 10, 15, 20]


def test_time_counts_since_the_last_save() -> None:
    """Minutes and hours fire once the time has passed; the shorter one counts."""
    assert not Every(minutes=2)(1, 119.9)
    assert Every(minutes=2)(1, 120.0)
    assert Every(minutes=90, hours=1)(1, 3600.0)
    assert Every(steps=10, hours=1)(10, 0.0)
    assert Every(steps=10, hours=1)(3, 3600.0)
    assert not Every(steps=10, hours=1)(3, 3599.0)


@pytest.mark.parametrize(
    "wrong", [{}, {"steps": 0}, {"steps": 1.5}, {"steps": True}, {"minutes": -1}, {"hours": float("nan")}]
)
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    """Nothing, zero, fractions of a step, and NaN are errors at once."""
    with pytest.raises(ValueError, match="Every"):
        Every(**wrong)  # type: ignore[arg-type]
