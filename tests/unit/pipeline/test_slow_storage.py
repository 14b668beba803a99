"""A storage that takes long is waited for by all ranks, and somebody says for whose."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import pytest

from ckptman.pipeline import together
from ckptman.pipeline.together import SLOW_S, _Handed, _Slow


class Clock:
    """Goes on when told to."""

    def __init__(self) -> None:
        self.at = 1000.0

    def monotonic(self) -> float:
        return self.at


class Given:
    """Slots from a thread that stages; waiting for one takes long too."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.arena = None

    @property
    def slots(self) -> Iterator[Any]:
        for number in range(2):
            self.clock.at += 10 * SLOW_S
            yield number


def test_a_call_that_hangs_is_named_after_a_while_and_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the wait for what is staged, nor many calls that each come back."""
    clock = Clock()
    monkeypatch.setattr(together, "time", clock)
    handed = _Handed(cast(Any, Given(clock)))
    slow = _Slow("rank 2 (host b), saving step 5", handed)
    stop = cast(Any, type("", (), {"is_set": staticmethod(lambda: False)}))
    said: list[list[str]] = []
    caplog.set_level(logging.WARNING, "ckptman")
    for _ in handed.until(stop):
        slow.look()
        clock.at += SLOW_S - 1
        slow.look()
    said.append([record.getMessage() for record in caplog.records])
    for _ in range(4 * int(SLOW_S) + 1):  # the fsync of a file
        clock.at += 1
        slow.look()
    said.append([record.getMessage() for record in caplog.records])
    assert said[0] == []
    assert said[1] == [
        f"rank 2 (host b), saving step 5: its storage has not answered for {seconds:.0f} s; all ranks wait for it"
        for seconds in (SLOW_S, 2 * SLOW_S, 4 * SLOW_S)
    ]
