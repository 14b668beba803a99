"""The parts that a large object is sent in."""

from __future__ import annotations

import numpy as np


class Part:
    """
    Memory for one part of at most *room_nbytes*, filled piece by piece, and again once it was sent.

    The memory is taken whole: growing, it would be copied each time, and lie there twice. It is not zeroed, so what
    was not filled yet costs nothing.
    """

    def __init__(self, room_nbytes: int) -> None:
        self._memory = np.empty(room_nbytes, np.uint8).data
        self._filled = 0

    @property
    def is_full(self) -> bool:
        return self._filled == len(self._memory)

    @property
    def bytes(self) -> memoryview:
        """What was filled in."""
        return self._memory[: self._filled]

    def take(self, data: memoryview) -> memoryview:
        """Copy what there is room for; return the rest of *data*."""
        taken = data[: len(self._memory) - self._filled]
        self._memory[self._filled : self._filled + len(taken)] = taken
        self._filled += len(taken)
        return data[len(taken) :]

    def empty(self) -> None:
        """Forget what was filled in. The memory stays."""
        self._filled = 0
