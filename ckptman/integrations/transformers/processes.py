"""
The processes of one training run, and what they have to agree on.

Model, optimizer and schedule are the same on every rank, so the first one saves them for all. Each rank has random
streams and a loss of its own, which go to the first. What fails on one rank fails on all of them, at the same call.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from ckptman import errors
from ckptman.coordinator import current
from ckptman.errors import CkptmanError, RankLost

Result = TypeVar("Result")


class Processes:
    """
    All processes of the run, as ``torch.distributed`` knows them.

    Every method but `close` is collective: each rank has to call it, in the same order, or all raise `RankLost`.
    """

    def __init__(self) -> None:
        self._coordinator = current(None)
        self.count = self._coordinator.world_size
        self.rank = self._coordinator.rank

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that saves."""
        return self.rank == 0

    def exchange(self, mine: bytes) -> list[bytes]:
        """What each rank has to say, by rank."""
        return self._coordinator.agree(mine)

    def of_first(self, mine: bytes) -> bytes:
        """What the first rank has to say. It waits for nobody, so this may be asked in every step."""
        return self._coordinator.broadcast(mine if self.is_first else None)

    def part(self) -> None:
        """Let the first rank go on only when all have heard what it said last: they may hear it through its process."""
        self._coordinator.gather(b"")

    def close(self) -> None:
        """Leave; whoever waits for this rank from now on gets `RankLost`."""
        self._coordinator.close()

    def together(self, act: Callable[[], Result]) -> Result:
        """
        What *act* returns here, once it has succeeded on every rank.

        Raises:
            Exception: It failed here, or elsewhere: then one of ours of the same class, with the rank in its text.
        """
        failure: Exception | None = None
        try:
            result = act()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others wait for it
            failure = error
        told = self.exchange(b"" if failure is None else _told(failure))
        if any(told):
            with suppress(RankLost):  # the failure is what matters
                self.part()
        if failure is not None:
            raise failure
        for rank, text in enumerate(told):
            if text:
                raise _heard(text, rank)
        return result

    def on_first(self, act: Callable[[], Result]) -> Result:
        """What *act*, a JSON value, is on the first rank, which alone calls it. Raises as `together`."""
        found = self.together(lambda: json.dumps(act()) if self.is_first else "")
        result: Result = json.loads(self.exchange(found.encode())[0])
        return result


def _told(error: Exception) -> bytes:
    return json.dumps([type(error).__name__, str(error)]).encode()


def _heard(text: bytes, rank: int) -> Exception:
    name, message = json.loads(text)
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, CkptmanError):
        return kind(f"rank {rank}: {message}")
    return RuntimeError(f"rank {rank}: {name}: {message}")
