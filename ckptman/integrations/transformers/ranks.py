"""
The processes of one training run, and what they have to agree on.

Model, optimizer and schedule are the same on every rank, so the first one saves them for all. Each rank has random
streams and a loss of its own, which go to the first. What fails on one rank fails on all of them, at the same call.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed

from ckptman import errors
from ckptman.errors import CkptmanError

Result = TypeVar("Result")


class Ranks:
    """
    All processes of the run; *device* is where their backend takes tensors from.

    Every method is collective: each rank has to call it, in the same order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        is_one_of_many = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if is_one_of_many else 1
        self.rank = distributed.get_rank() if is_one_of_many else 0

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that saves."""
        return self.rank == 0

    def exchange(self, mine: bytes) -> list[bytes]:
        """What each rank has to say, by rank."""
        if self.count == 1:
            return [mine]
        sizes = [int(size.item()) for size in self._gathered(torch.tensor([len(mine)]))]
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        padded[: len(mine)] = torch.frombuffer(bytearray(mine or b"\0"), dtype=torch.uint8)[: len(mine)]
        parts = self._gathered(padded)
        return [part[:size].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def _gathered(self, mine: torch.Tensor) -> list[torch.Tensor]:
        there = mine.to(self._device)
        parts = [torch.empty_like(there) for _ in range(self.count)]
        distributed.all_gather(parts, there)
        return [part.cpu() for part in parts]

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
