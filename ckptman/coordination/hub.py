"""
Gathering and broadcasting over a board, with rank 0 as the hub.

Every rank waits for rank 0 only, and rank 0 waits for each: so there are no chains in which B waits for C, which has
given up long ago because A died. An operation has a number, the same on all ranks since all call the same methods in
the same order, and its values lie under that number:

    gather       rank r pins <epoch>.<number>.<r> and goes on; rank 0 waits for all, reads them and takes them down
    broadcast    rank 0 pins <epoch>.<number>.0 and goes on; the others wait for it

**How a failure reaches all.** Whoever finds in an operation that a rank is lost (silent, gone, never came), or is
interrupted in it, pins ``<epoch>.broken`` with the reason (the first one stands), and raises. Whoever waits looks for
that key every second, and raises the same. A rank that was not waiting meets it in its next operation that waits. So
what ranks do together should end with a broadcast, or an `agree`: a failed gather alone is known to rank 0 only.

**How they go on.** After an error each rank enters the next epoch with number 0. Nothing of the broken epoch can be
taken for something of the next one, since the epoch is part of every key. Where all ranks live on, the next operation
simply works; where one is dead, it is found silent at once. Nothing is ever "out of step" for good.

**While ranks work.** Between two operations a rank may write for minutes, and hears nothing then unless it asks. So a
rank that will have nothing to give in the next gather says so at once, under ``<epoch>.<number>.warned``; and who works
for long asks with ``attend`` every second whether anybody did, or whether somebody is lost.

What cannot be promised (by anybody): that all ranks know the outcome of the very last message. If rank 0 is lost after
it decided and before it told, the others raise `RankLost` and do not know what it decided. What it decided is in the
catalog.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

import msgspec

from ckptman.coordination.board import Board
from ckptman.coordination.life import LOOK_S, Life
from ckptman.errors import RankLost, StorageError

MIN_PAUSE_S = 0.0002

PAUSE_SHARE = 0.06
"""How long to pause between two looks, as a share of the wait so far: what waiting may cost beyond what is awaited."""

PATIENCE_S = 1800.0
"""How long to wait for a rank that lives, or that never began, before it counts as lost."""


_WARNED = "warned"


class _Reason(msgspec.Struct, frozen=True):
    """Why an epoch is broken, on its way to all ranks."""

    message: str
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    waited_s: float


class Hub:
    """
    A coordinator over a board. One thread at a time; another thread, or another purpose, takes a `channel`.

    Args:
        board: What this object talks through; it is closed with it.
        life: Beats for this rank.
        rank: Which one this is.
        world_size: Of how many.
        name: What its keys begin with: the same on all ranks, and of no other hub of the job.
        patience_s: How long to wait for a rank that lives but does not come.
    """

    def __init__(
        self, board: Board, life: Life, *, rank: int, world_size: int, name: str, patience_s: float = PATIENCE_S
    ) -> None:
        self._board = board
        self._life = life
        self._rank = rank
        self._world_size = world_size
        self._name = name
        self._patience_s = patience_s
        self._epoch = 0
        self._number = 0
        self._answers: list[str] = []  # rank 0's, which others may not have read yet
        self._warning: str | None = None  # this rank's, which others may not have read yet
        self._channels: list[Hub] = []
        self._is_closed = False

    @property
    def rank(self) -> int:
        """Which rank this is."""
        return self._rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self._world_size

    @property
    def host(self) -> str:
        """The name of this machine."""
        return socket.gethostname()

    def channel(self, name: str) -> Hub:
        """
        A coordinator of the same ranks whose operations are counted apart, for another thread. Not collective.

        It ends with this one. *name* is the same on all ranks, and given out once.
        """
        channel = Hub(
            self._board.connect(),
            self._life,
            rank=self._rank,
            world_size=self._world_size,
            name=f"{self._name}-{name}",
            patience_s=self._patience_s,
        )
        self._channels.append(channel)
        return channel

    # operations

    def gather(self, value: bytes) -> list[bytes] | None:
        """All values, by rank, on rank 0; None elsewhere, at once. Raises `RankLost`, on rank 0 only: see above."""
        with self._operation() as at:
            if self._rank:
                self._board.pin(f"{at}.{self._rank}", b"g" + value)
                return None
            keys = {rank: f"{at}.{rank}" for rank in range(1, self._world_size)}
            self._wait_for(keys)
            values = [self._checked(self._board.read(key), b"g") for key in keys.values()]
            # Whoever gave a value here has read every answer before it.
            self._board.remove([*keys.values(), *self._answers])
            self._answers.clear()
            return [value, *values]

    def broadcast(self, value: bytes | None) -> bytes:
        """The value of rank 0, on every rank; what others give is ignored. Raises `RankLost`."""
        with self._operation():
            key = self._answer_key(self._number)
            if self._rank:
                self._wait_for({0: key})
                value = self._checked(self._board.read(key), b"b")
                self._take_back_warning()
                return value
            if value is None:
                raise TypeError("rank 0 has a value to broadcast, not None")
            self._raise_if_broken()
            self._board.pin(key, b"b" + value)
            self._answers.append(key)
            self._take_back_warning()
            return value

    def warn(self) -> None:
        """Say that this rank will have nothing good to give in the gather that comes next. Never waits."""
        with self._breaking() as at, suppress(StorageError):  # the others will hear of it in the gather
            self._warning = f"{at}.{_WARNED}"
            self._board.pin_first(self._warning, str(self._rank).encode())

    def attend(self) -> bool:
        """
        Whether a rank warned the others of the gather that comes next. To be asked about every `LOOK_S`. Never waits.

        Raises:
            RankLost: A rank is gone, or gave up; the next operation is one of the next epoch.
        """
        with self._breaking() as at:
            if self._rank:
                keys = {0: self._answer_key(self._number + 1)}
            else:
                keys = {rank: f"{at}.{rank}" for rank in range(1, self._world_size)}
            self._look(keys, 0.0)
            return self._board.has(f"{at}.{_WARNED}")

    def agree(self, value: bytes) -> list[bytes]:
        """All values, by rank, on every rank. Raises `RankLost`, on all ranks."""
        values = self.gather(value)
        told = self.broadcast(None if values is None else msgspec.msgpack.encode(values))
        return values if values is not None else msgspec.msgpack.decode(told, type=list[bytes])

    def hurry(self) -> None:
        """Wait less for ranks that seem dead from now on, also in what is under way, on any thread."""
        self._life.hurry()

    def close(self) -> None:
        """Stop beating: whoever waits for this rank from now on is told that it left. Again: does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        with suppress(StorageError):  # a board that is gone needs no farewell
            self._board.pin(self._left(self._rank), b"")
        for channel in self._channels:
            channel._is_closed = True
            channel._board.close()
        self._life.stop()
        self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_left(self, timeout_s: float) -> None:
        """Return once all but dead ranks have left, at the latest after *timeout_s*. Raises StorageError."""
        ends_at = time.monotonic() + timeout_s
        silent = self._life.silent(range(self._world_size))
        left = [self._left(rank) for rank in range(self._world_size) if rank not in silent]
        while not all(map(self._board.has, left)) and time.monotonic() < ends_at:
            time.sleep(self._board.max_pause_s)

    # what they are made of

    @contextmanager
    def _operation(self) -> Iterator[str]:
        with self._breaking() as at:
            yield at
        self._number += 1

    @contextmanager
    def _breaking(self) -> Iterator[str]:
        """What goes wrong within ends the epoch, on all ranks."""
        if self._is_closed:
            raise ValueError("this coordinator is closed")
        try:
            yield f"{self._name}.{self._epoch}.{self._number}"
        except BaseException as error:
            lost = self._break(error)
            self._epoch += 1
            self._number = 0
            self._answers.clear()
            self._warning = None
            if lost is None:
                raise
            raise lost from error.__cause__

    def _answer_key(self, number: int) -> str:
        return f"{self._name}.{self._epoch}.{number}.0"

    def _take_back_warning(self) -> None:
        """All ranks have given their parts: nobody looks for it any more."""
        if self._warning is not None:
            self._board.remove([self._warning])
            self._warning = None

    def _break(self, error: BaseException) -> RankLost | None:
        """Tell everybody that this epoch is over; return what to raise instead of *error*, None for *error* itself."""
        lost = self._lost_keeper(error) if isinstance(error, StorageError) else error
        if not isinstance(lost, RankLost):
            what = f"rank {self._rank} (host {self.host}) left what all ranks do together: {type(error).__name__}"
            reason = _Reason(message=f"{what}: {error}", ranks=(self._rank,), hosts=(self.host,), waited_s=0.0)
        else:
            reason = _Reason(message=str(lost), ranks=lost.ranks, hosts=lost.hosts, waited_s=lost.waited_s)
        try:
            told = self._board.pin_first(self._broken(), _encoded(reason))
        except StorageError:
            return lost if isinstance(lost, RankLost) else None
        return _error(told) if isinstance(lost, RankLost) else None

    def _lost_keeper(self, error: StorageError) -> BaseException:
        keeper = self._board.keeper
        if keeper is None:
            return error
        lost = RankLost(
            f"the store of the process group, which rank {keeper} or its launcher keeps, does not answer rank "
            f"{self._rank} (host {self.host}): {error}",
            ranks=(keeper,),
        )
        lost.__cause__ = error
        return lost

    def _wait_for(self, keys: dict[int, str]) -> None:
        """Return once all *keys*, by the rank that is to pin each, are there. Raises `RankLost`."""
        began = looked_at = time.monotonic()
        for key in keys.values():
            while not self._board.has(key):
                now = time.monotonic()
                if now - looked_at >= LOOK_S:
                    self._look(keys, now - began)
                    looked_at = time.monotonic()
                pause_s = max(MIN_PAUSE_S, PAUSE_SHARE * (now - began))
                time.sleep(min(pause_s, self._board.max_pause_s))

    def _look(self, keys: dict[int, str], waited_s: float) -> None:
        self._raise_if_broken()
        left = [rank for rank, key in keys.items() if self._board.has(self._left(rank)) and not self._board.has(key)]
        if left:
            raise self._lost(left, "left (its manager was closed, or never went on)", waited_s)
        silent = {rank: s for rank, s in self._life.silent(keys).items() if not self._board.has(keys[rank])}
        if silent:
            raise self._lost(list(silent), f"is silent for {max(silent.values()):.0f} s", waited_s)
        if waited_s > self._patience_s:
            absent = [rank for rank, key in keys.items() if not self._board.has(key)]
            if absent:
                raise self._lost(absent, f"did not come within {waited_s:.0f} s", waited_s)

    def _lost(self, ranks: list[int], what: str, waited_s: float) -> RankLost:
        hosts = tuple(self._host_of(rank) for rank in ranks)
        named = ", ".join(f"rank {rank} (host {host})" for rank, host in zip(ranks, hosts, strict=True))
        return RankLost(f"{named} {what}", ranks=tuple(ranks), hosts=hosts, waited_s=waited_s)

    def _host_of(self, rank: int) -> str:
        key = host_key(rank)
        return self._board.read(key).decode() if self._board.has(key) else "unknown"

    def _raise_if_broken(self) -> None:
        if self._board.has(self._broken()):
            raise _error(self._board.read(self._broken()))

    def _broken(self) -> str:
        return f"{self._name}.{self._epoch}.broken"

    def _left(self, rank: int) -> str:
        return f"left.{rank}"

    def _checked(self, value: bytes, kind: bytes) -> bytes:
        if value[:1] != kind:
            raise RuntimeError("ranks called different methods of their coordinators: all call the same, in one order")
        return value[1:]


def host_key(rank: int) -> str:
    """Where *rank* says on which host it is."""
    return f"host.{rank}"


def _encoded(reason: _Reason) -> bytes:
    """The names of files, which errors quote, may hold what UTF-8 has not."""
    message = reason.message.encode("utf-8", "backslashreplace").decode()
    return msgspec.json.encode(msgspec.structs.replace(reason, message=message))


def _error(told: bytes) -> RankLost:
    reason = msgspec.json.decode(told, type=_Reason)
    return RankLost(reason.message, ranks=reason.ranks, hosts=reason.hosts, waited_s=reason.waited_s)
