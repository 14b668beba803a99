"""
The ranks of a job: which one this is, of how many, and the few words that they exchange.

Three kinds: `Solo` for a process alone, `TorchCoordinator` where a process group exists, `FilesCoordinator` where
ranks share nothing but the storage.
"""

from __future__ import annotations

import itertools
import socket
from typing import Protocol, Self, runtime_checkable

import torch.distributed as dist

from ckptman.coordination.hub import PATIENCE_S, Hub, host_key
from ckptman.coordination.life import SILENCE_S, Life
from ckptman.coordination.torch_board import TorchBoard
from ckptman.errors import RankLost

__all__ = ["Coordinator", "RankLost", "Solo", "TorchCoordinator", "current"]


@runtime_checkable
class Coordinator(Protocol):
    """
    Ranks that save together.

    Every method but `channel` and `close` is collective: all ranks call it, in the same order, on one thread at a time.
    """

    @property
    def rank(self) -> int:
        """Which rank this is, from 0 on."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    @property
    def host(self) -> str:
        """The name of this machine."""

    def gather(self, value: bytes) -> list[bytes] | None:
        """
        All values, by rank, on rank 0; None elsewhere, without waiting for anybody.

        Raises:
            RankLost: On rank 0, a rank is gone. The others learn it in the next `broadcast` or `agree`, so what is
                begun with a gather ends with one of these.
        """

    def broadcast(self, value: bytes | None) -> bytes:
        """
        The value of rank 0, on every rank; the others give None.

        Raises:
            RankLost: A rank is gone, or gave up.
        """

    def agree(self, value: bytes) -> list[bytes]:
        """
        All values, by rank, on every rank.

        Raises:
            RankLost: A rank is gone, or gave up; on every rank.
        """

    def channel(self, name: str) -> Coordinator:
        """The same ranks, for another thread or purpose: its calls are counted apart. Not collective."""

    def close(self) -> None:
        """Leave. Whoever waits for this rank from now on gets `RankLost`. Channels end with it."""


class Solo:
    """A process alone."""

    @property
    def rank(self) -> int:
        """0."""
        return 0

    @property
    def world_size(self) -> int:
        """1."""
        return 1

    @property
    def host(self) -> str:
        """The name of this machine."""
        return socket.gethostname()

    def gather(self, value: bytes) -> list[bytes] | None:
        """Its own value."""
        return [value]

    def broadcast(self, value: bytes | None) -> bytes:
        """Its own value."""
        if value is None:
            raise TypeError("rank 0 has a value to broadcast, not None")
        return value

    def agree(self, value: bytes) -> list[bytes]:
        """Its own value."""
        return [value]

    def channel(self, name: str) -> Self:
        """Itself: there is nobody to be out of step with."""
        return self

    def close(self) -> None:
        """Nothing to leave."""


_instances = itertools.count()


class TorchCoordinator(Hub):
    """
    The ranks of ``torch.distributed``'s default group, whatever its backend: they talk through its store.

    No collective of the training is ever run, on any thread, and no group is made. To be constructed on every rank, in
    the same order if there are several. It waits for nobody.

    A rank that dies, or stops beating, is named on all others within 30 s. A rank that lives is waited for.

    Args:
        silence_s: How long a rank may be silent before it counts as lost. It beats from a thread, so it is silent only
            if it is dead, stopped, cut off, or held up in code that keeps Python's lock.
        patience_s: How long to wait for a rank that lives and does not come, or that never began.

    Raises:
        ValueError: There is no process group.
    """

    def __init__(self, *, silence_s: float = SILENCE_S, patience_s: float = PATIENCE_S) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("there is no process group: call torch.distributed.init_process_group first")
        # torch has no public way to the store of the default group; this one is there since 1.9
        store = dist.distributed_c10d._get_default_store()
        board = TorchBoard(store, f"ckptman/{next(_instances)}")
        rank = dist.get_rank()
        life = Life(board.connect(), rank, silence_s=silence_s)
        super().__init__(board, life, rank=rank, world_size=dist.get_world_size(), name="main", patience_s=patience_s)
        board.pin(host_key(rank), self.host.encode())
        life.start()


def current(coordinator: Coordinator | None) -> Coordinator:
    """*coordinator*, or for None the process group's where there is one of several ranks, else `Solo`."""
    if coordinator is not None:
        return coordinator
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchCoordinator()
    return Solo()
