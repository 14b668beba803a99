"""Trying again, where that can do no harm: bounded in number and in time, ever slower, never in step with others."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """
    How often and how slowly a call is repeated.

    Before try *n* + 1 it waits between half of and all of ``first_s * 2 ** (n - 1)``, at most ``longest_s``, and no
    try begins more than ``patience_s`` after the first. Only for calls that may take effect twice without harm.
    """

    tries: int = 5
    first_s: float = 0.1
    longest_s: float = 5.0
    patience_s: float = 60.0
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic
    random: Callable[[], float] = random.SystemRandom().random  # the global stream is part of what is saved

    def __call__(self, call: Callable[[], Result], *, is_transient: Callable[[Exception], bool]) -> Result:
        """What *call* returns, or the error of its last try: one that is not transient is never repeated."""
        began = self.clock()
        for number in range(1, self.tries):
            try:
                return call()
            except Exception as error:
                wait_s = min(self.longest_s, self.first_s * 2 ** (number - 1)) * (1 + self.random()) / 2
                if not is_transient(error) or self.clock() + wait_s - began > self.patience_s:
                    raise
            self.sleep(wait_s)
        return call()
