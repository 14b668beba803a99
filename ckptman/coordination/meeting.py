"""
Collectives over a board: a place where all ranks put small values and find those of others.

Why not collectives of torch.distributed: those of gloo and NCCL give a rank up that is *slow* (which a rank that
writes its part of a checkpoint may be), or notice only after half an hour that one is *gone*; after such a timeout the
group is broken; and all of them must be called in one order, by whatever thread. Here a wait ends for three reasons:

1. The value is there.
2. A rank said that it left, or that it lost one.
3. The pulse of a rank that is waited for has stood still for ``silence_s``, by the clock of whoever waits. No two
   clocks are compared.

*A rank is killed.* Its pulse stands still. Whoever waits for it sees that, puts up who was lost, and raises; whoever
waits for somebody else sees the note. All of them name the same rank.

*A rank is stopped, and goes on (SIGSTOP, a laptop's lid).* It was given up meanwhile. It finds the note at its next
call, and raises too.

*A rank's process is busy for longer than* ``silence_s`` *without letting another thread run.* It is given up although
it lives: a job in which threads cannot run for 20 s is not served.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec

from ckptman.coordination.coordinator import Coordinator, RankLost

Result = TypeVar("Result")

SILENCE_S = 20.0
BEATS = 5
"""How many beats of its pulse a rank may miss before it is given up."""

_LOST = "lost"
_FIRST_PAUSE_S = 0.0005
_GOODBYE_S = 5.0


class Board(Protocol):
    """Where ranks put values and find those of others. Safe to use from several threads; nothing of it waits."""

    longest_pause_s: float
    """How long to wait at most between two looks."""

    def put(self, key: str, value: bytes) -> None:
        """Put *value* up. A key is put up by one rank, once."""

    def find(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Of *keys* those that are there, with their values."""

    def delete(self, keys: Iterable[str]) -> None:
        """Take *keys* down, those that are there."""

    def beat(self, rank: int, count: int) -> None:
        """Show that *rank* lives: *count* differs from the last one."""

    def beats(self, ranks: Sequence[int]) -> Mapping[int, int]:
        """The last count of each of *ranks* that has shown one."""


class _Pulse:
    """The thread that shows that this rank lives. It ends with `stop`, and keeps nobody else alive."""

    def __init__(self, board: Board, rank: int, interval_s: float) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, args=(board, rank, interval_s), name="ckptman-pulse", daemon=True
        )
        board.beat(rank, 0)
        self._thread.start()

    def _beat(self, board: Board, rank: int, interval_s: float) -> None:
        count = 1
        while not self._stopping.wait(interval_s):
            with contextlib.suppress(Exception):  # a board that is gone is noticed by whoever waits for a value
                board.beat(rank, count)
            count += 1

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_GOODBYE_S)


class Meeting:
    """
    A `Coordinator` over a board.

    Args:
        board: Of these ranks and of nobody else, and empty at first.
        rank: Which rank this is.
        world_size: How many there are.
        silence_s: After how many seconds without a sign of life a rank is given up.
    """

    def __init__(self, board: Board, rank: int, world_size: int, *, silence_s: float = SILENCE_S) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to {world_size - 1}, got {rank}")
        self.rank = rank
        self.world_size = world_size
        self._board = board
        self._silence_s = silence_s
        self._name = "0"
        self._children = 0
        self._turn = 0
        self._spread: str | None = None  # rank 0: what was broadcast last
        self._said: dict[int, str] = {}
        self._pulse: _Pulse | None = _Pulse(board, rank, silence_s / BEATS)
        self._pid = os.getpid()
        weakref.finalize(self, self._pulse._stopping.set)
        board.put(f"who/{rank}", f"host {socket.gethostname()}, pid {self._pid}".encode())

    def gather(self, value: bytes) -> list[bytes] | None:
        """The values of all ranks, by rank, on rank 0. See `Coordinator.gather`."""
        self._turn += 1
        names = [f"{self._name}/{self._turn}/{rank}" for rank in range(self.world_size)]
        if self.rank:
            self._ask(lambda: self._board.put(names[self.rank], value))
            return None
        found = self._await({name: rank for rank, name in enumerate(names) if rank})
        # whoever gave a value for this turn has read what was spread before it
        self._ask(lambda: self._board.delete([*names[1:], *([self._spread] if self._spread else [])]))
        self._spread = None
        return [value, *(found[name] for name in names[1:])]

    def broadcast(self, value: bytes | None) -> bytes:
        """The value of rank 0, everywhere. See `Coordinator.broadcast`."""
        self._turn += 1
        name = f"{self._name}/{self._turn}/all"
        if self.rank:
            return self._await({name: 0})[name]
        assert value is not None
        given = value
        self._ask(lambda: self._board.put(name, given))
        self._spread = name
        return value

    def another(self) -> Coordinator:
        """The same ranks, for another thread. See `Coordinator.another`."""
        self._children += 1
        other = object.__new__(Meeting)
        other.__dict__.update(self.__dict__)
        other._name = f"{self._name}.{self._children}"
        other._turn = other._children = 0
        other._spread = other._pulse = None
        return other

    def close(self) -> None:
        """Leave; rank 0 waits a few seconds for the others to leave, since the board may end with its process."""
        pulse, self._pulse = self._pulse, None
        if pulse is None or os.getpid() != self._pid:
            return
        with contextlib.suppress(Exception):  # the board may be gone, with all others
            self._board.put(f"left/{self.rank}", b"it left: its manager was closed, or its process is about to end")
            if self.rank == 0:
                self._wait_for_goodbyes()
        pulse.stop()

    def _wait_for_goodbyes(self) -> None:
        names = [f"left/{rank}" for rank in range(1, self.world_size)]
        ends_at = time.monotonic() + _GOODBYE_S
        while time.monotonic() < ends_at and not self._board.find([_LOST]):
            if len(self._board.find(names)) == len(names):
                return
            time.sleep(0.01)

    # waiting

    def _await(self, names: Mapping[str, int]) -> dict[str, bytes]:
        """The values of *names*, once all are there; each is owed by a rank."""
        found: dict[str, bytes] = {}
        watch = _Watch(self._silence_s)
        pause_s = _FIRST_PAUSE_S
        while True:
            missing = [name for name in names if name not in found]
            found |= self._ask(lambda missing=missing: self._board.find(missing))  # type: ignore[misc]
            owing = sorted({rank for name, rank in names.items() if name not in found})
            if not owing:
                return found
            if watch.is_due():
                self._raise_if_lost(owing, watch)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.3, self._board.longest_pause_s)

    def _raise_if_lost(self, owing: Sequence[int], watch: _Watch) -> None:
        noted = self._ask(lambda: self._board.find([_LOST]))
        if noted:
            rank, why = msgspec.json.decode(noted[_LOST], type=tuple[int, str])
            raise RankLost(why, rank=rank)
        left = self._ask(lambda: self._board.find([f"left/{rank}" for rank in owing]))
        for rank in owing:
            if reason := left.get(f"left/{rank}"):
                self._give_up(rank, reason.decode())
        silent = watch.silent(owing, self._ask(lambda: self._board.beats(owing)))
        if silent:
            self._give_up(silent[0], f"it has given no sign of life for {self._silence_s:g} s: was it killed?")

    def _give_up(self, rank: int, why: str) -> None:
        who = self._ask(lambda: self._board.find([f"who/{rank}"])).get(f"who/{rank}", b"never seen").decode()
        text = f"rank {rank} of {self.world_size} ({who}) was lost: {why}"
        with contextlib.suppress(Exception):  # somebody may have been faster, and then that note stands
            self._board.put(_LOST, msgspec.json.encode((rank, text)))
        raise RankLost(text, rank=rank)

    def _ask(self, question: Callable[[], Result]) -> Result:
        """What the board says. A board that fails is lost, and so is everybody."""
        try:
            return question()
        except Exception as error:
            raise RankLost(
                f"rank {self.rank} of {self.world_size} cannot reach the others any more: "
                f"{type(error).__name__}: {error}"
            ) from error


class _Watch:
    """Since when the pulse of each rank stands still, for one wait, by our own monotonic clock."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._interval_s = silence_s / (4 * BEATS)
        self._next_look_at = 0.0
        self._seen: dict[int, tuple[int | None, float]] = {}

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next_look_at:
            return False
        self._next_look_at = now + self._interval_s
        return True

    def silent(self, ranks: Sequence[int], beats: Mapping[int, int]) -> list[int]:
        """Those of *ranks* whose count has been the same for too long; one never seen is one that stands still."""
        now = time.monotonic()
        for rank in ranks:
            count = beats.get(rank)
            if rank not in self._seen or self._seen[rank][0] != count:
                self._seen[rank] = count, now
        return [rank for rank in ranks if now - self._seen[rank][1] > self._silence_s]
