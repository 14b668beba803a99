"""
The ranks of a job: which one this is, of how many, and the few words that they exchange.

Three kinds: `Solo` for a process alone, `TorchCoordinator` where a process group exists, `FilesCoordinator` where
ranks share nothing but the storage.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol, Self, runtime_checkable

import torch.distributed as dist

from ckptman.coordination.hub import PATIENCE_S, Hub, host_key
from ckptman.coordination.jobs import folder_name, place
from ckptman.coordination.joining import join
from ckptman.coordination.leftovers import FOLDER, Leftovers
from ckptman.coordination.life import SILENCE_OF_FILES_S, SILENCE_S, Life
from ckptman.coordination.meeting import meet
from ckptman.coordination.storage_board import StorageBoard
from ckptman.coordination.torch_board import PrefixStore, TorchBoard, connection, lives_in_rank_0
from ckptman.errors import RankLost, StorageError
from ckptman.storage.base import Storage
from ckptman.storage.opening import open_storage

__all__ = ["Coordinator", "FilesCoordinator", "RankLost", "Solo", "TorchCoordinator", "current"]

_log = logging.getLogger("ckptman")


@runtime_checkable
class Coordinator(Protocol):
    """
    Ranks that save together.

    Every method but `warn`, `attend`, `channel`, `hurry` and `close` is collective: all ranks call it, in the same
    order, on one thread at a time.
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

    def warn(self) -> None:
        """
        This rank will have nothing good to give in the next `gather`: the others may stop working for theirs.

        On the thread that gathers. Never waits.
        """

    def attend(self) -> bool:
        """
        Whether a rank warned the others. To be asked about once a second by who works for long for a `gather`.

        On the thread that gathers. Never waits.

        Raises:
            RankLost: A rank is gone, or gave up; on every rank, now or in what it does next, and the gather is off.
        """

    def channel(self, name: str) -> Coordinator:
        """The same ranks, for another thread or purpose: its calls are counted apart. Not collective."""

    def hurry(self) -> None:
        """
        This rank is about to leave, and others may be dead: find out sooner, also in what is under way.

        On any thread. A rank that lives is still waited for.
        """

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

    def warn(self) -> None:
        """Nobody to warn."""

    def attend(self) -> bool:
        """False."""
        return False

    def channel(self, name: str) -> Self:
        """Itself: there is nobody to be out of step with."""
        return self

    def hurry(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to leave."""


_instances = itertools.count()

FAREWELL_S = 5.0
"""How long rank 0 stays for the others when the store lives in its process."""


class TorchCoordinator(Hub):
    """
    The ranks of ``torch.distributed``'s default group, whatever its backend: they talk through its store.

    No collective of the training is ever run, on any thread, and no group is made. To be constructed on every rank, in
    the same order if there are several: it returns once all are there.

    A rank that dies, or stops beating, is named on all others within 30 s. A rank that lives is waited for.

    Without torchrun, the store usually lives in the process of rank 0, and the others can ask it nothing once that has
    ended. So there, ``close`` on rank 0 returns when all others have closed theirs, after `FAREWELL_S` at the latest.
    Who never closes does so at the end of the interpreter.

    Args:
        silence_s: How long a rank may be silent before it counts as lost. It beats from a thread, so it is silent only
            if it is dead, stopped, cut off, or held up in code that keeps Python's lock.
        patience_s: How long to wait for a rank that lives and does not come, here and later.

    Raises:
        ValueError: There is no process group.
        RankLost: Not all ranks came.
    """

    def __init__(self, *, silence_s: float = SILENCE_S, patience_s: float = PATIENCE_S) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("there is no process group: call torch.distributed.init_process_group first")
        # torch has no public way to the store of the default group; this one is there since 1.9
        store = dist.distributed_c10d._get_default_store()
        rank, world_size, prefix = dist.get_rank(), dist.get_world_size(), f"ckptman/{next(_instances)}"
        session = meet(
            PrefixStore(prefix, connection(store)),
            rank=rank,
            world_size=world_size,
            nonce=secrets.token_hex(8),
            timeout_s=patience_s,
        )
        board = TorchBoard(store, f"{prefix}/{session}")
        life = Life(board.connect(), rank, silence_s=silence_s)
        super().__init__(board, life, rank=rank, world_size=dist.get_world_size(), name="main", patience_s=patience_s)
        board.pin(host_key(rank), self.host.encode())
        life.start()
        is_mortal = lives_in_rank_0(store)
        self._keeps_store = is_mortal and rank == 0
        if is_mortal:
            atexit.register(self.close)

    def close(self) -> None:
        """Leave; where the store lives in this process, stay a while for those that still read. Again: nothing."""
        atexit.unregister(self.close)
        if self._is_closed:
            return
        super().close()
        if self._keeps_store:
            with suppress(StorageError):  # then there is nobody to stay for
                self._wait_until_left(FAREWELL_S)


class FilesCoordinator(Hub):
    """
    Ranks that share nothing but a storage: no process group, no network. They talk through ``ranks/`` in the root.

    The constructor returns once all ranks are there. A rank that comes late is waited for; one that does not come is
    named. A job that is started again never takes what its predecessor left for its own, even under the same name:
    see `ckptman.coordination.joining`. ``close`` leaves nothing behind; what killed jobs left is deleted by later ones.

    Every word is a file that is made and listed: some milliseconds on a local disk, a second or two on a bucket. It is
    for ranks whose training is not coupled by collectives; where there is a process group, take `TorchCoordinator`.

    Example:
        >>> from ckptman import FilesCoordinator
        >>> with FilesCoordinator("memory://doc", rank=0, world_size=1, job="sweep-3") as ranks:
        ...     ranks.agree(b"here")
        [b'here']

    Args:
        root: The root of the checkpoints, or any other path, URL or storage that all ranks reach.
        rank, world_size: Which rank this is, and of how many. None: as torchrun, MPI or SLURM say in the environment.
        job: A name that all ranks of this job have, and no other job that runs at the same time. None: that of the
            launcher or the scheduler, with its count of restarts.
        timeout_s: How long to wait for all ranks to come.
        silence_s: How long a rank may be silent before it counts as lost.
        patience_s: How long to wait, later, for a rank that lives and does not come.
        storage_options: For the driver of *root*'s URL, as for `CheckpointManager`.

    Raises:
        ValueError: Rank, world size or job are not known.
        RankLost: Not all ranks came in time.
        StorageError: The medium failed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        job: str | None = None,
        timeout_s: float = 300.0,
        silence_s: float = SILENCE_OF_FILES_S,
        patience_s: float = PATIENCE_S,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        storage = open_storage(root, storage_options=storage_options)
        mine = place(os.environ, rank=rank, world_size=world_size, job=job)
        self._leftovers = Leftovers(storage) if mine.rank == 0 else None
        folder = f"{FOLDER}/{folder_name(mine.job)}"
        nonce = secrets.token_hex(8)
        session = join(
            storage,
            folder,
            rank=mine.rank,
            world_size=mine.world_size,
            nonce=nonce,
            host=self.host,
            timeout_s=timeout_s,
        )
        self._files = StorageBoard(storage, folder, session)
        self._files.pin(f"one.{mine.rank}", nonce.encode())  # refuses a second process with this rank
        life = Life(self._files.connect(), mine.rank, silence_s=silence_s)
        super().__init__(
            self._files, life, rank=mine.rank, world_size=mine.world_size, name="main", patience_s=patience_s
        )
        self._files.pin(host_key(mine.rank), self.host.encode())
        life.start()

    def close(self) -> None:
        """Leave; the last one out deletes what they said. Again: does nothing."""
        if self._is_closed:
            return
        super().close()
        try:
            self._files.clear_if_all_left(self.world_size)
            if self._leftovers is not None:
                self._leftovers.sweep()
        except StorageError as error:
            _log.warning("could not delete what the ranks of this job said to each other: %s", error)


def current(coordinator: Coordinator | None) -> Coordinator:
    """*coordinator*, or for None the process group's where there is one of several ranks, else `Solo`."""
    if coordinator is not None:
        return coordinator
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchCoordinator()
    return Solo()
