"""What ckptman asks of the ranks of a job: to gather bytes on rank 0, and to spread them from there."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch.distributed as dist


class RankLost(ConnectionError):
    """
    A rank went away, or has not been heard of for too long. The coordinator is of no use any more.

    Attributes:
        rank: The lowest rank that was lost; None where what all ranks talk through was lost.
    """

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


@runtime_checkable
class Coordinator(Protocol):
    """
    Ranks that save together.

    ``gather`` and ``broadcast`` are collective: all ranks call them, in the same order, each from one thread at a time.
    A rank may take as long as it likes to come to a call, as long as it lives: nobody gives it up because it is slow.

    Every method may raise `RankLost`: in a call that waits for a rank that went away, within about half a minute; and
    in every later call, on every rank.
    """

    @property
    def rank(self) -> int:
        """Which rank this is, from 0 on."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def gather(self, value: bytes) -> list[bytes] | None:
        """The values of all ranks, by rank, on rank 0; None on the others, which do not wait."""

    def broadcast(self, value: bytes | None) -> bytes:
        """The value of rank 0, on every rank; the others give None. Rank 0 does not wait."""

    def another(self) -> Coordinator:
        """One for another thread: the same ranks, but its calls are in no order with those of this one. Collective."""

    def close(self) -> None:
        """Leave. Whoever waits for this rank from now on loses it at once. Calling it again does nothing."""


class Solo:
    """One process, which needs nobody."""

    rank = 0
    world_size = 1

    def gather(self, value: bytes) -> list[bytes] | None:
        """The one value."""
        return [value]

    def broadcast(self, value: bytes | None) -> bytes:
        """*value*, which must be given."""
        assert value is not None
        return value

    def another(self) -> Coordinator:
        """This one: there is no order to keep."""
        return self

    def close(self) -> None:
        """Nothing to leave."""


def current(coordinator: Coordinator | None) -> Coordinator:
    """
    *coordinator*, or what this process is part of: ``torch.distributed`` where that has several ranks, else nothing.

    Raises:
        TypeError: *coordinator* is none.
        ValueError: ``torch.distributed`` runs on a backend without a store (MPI).
    """
    from ckptman.coordination.torch_store import Torch

    if coordinator is None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return Torch()
        return Solo()
    if not isinstance(coordinator, Coordinator):
        raise TypeError(f"coordinator must be ckptman.coordination.Torch(), Files(…) or Solo(), got {coordinator!r}")
    return coordinator
