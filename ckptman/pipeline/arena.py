"""
The staging memory: page-aligned slots that are taken, filled, written and given back.

A slot is a segment of a file. With as many slots as the state has segments, the whole state is staged at once; with
fewer they go round as a ring. Slots are kept for the next save, since fresh memory is slow: its first touch costs
several times a copy (page faults).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ckptman.pipeline.budget import free_nbytes

_log = logging.getLogger("ckptman")

SLOT_NBYTES = 16 << 20
"""Large enough for a disk's full speed in one write, and one part of an upload; small enough to be a step of a ring."""

_HUGE_PAGE_NBYTES = 2 << 20


class Arrival(Protocol):
    """An event of a device: copies that were queued before it have arrived once ``synchronize`` returns."""

    def synchronize(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """
    `SLOT_NBYTES` of page-aligned host memory, as a tensor of bytes and as a buffer to be written from.

    ``arrivals`` is what devices still copy to it: to be waited for before anybody looks.
    """

    tensor: torch.Tensor
    view: memoryview
    arrivals: list[Arrival] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until every byte has arrived; for the thread that has the slot."""
        while self.arrivals:
            self.arrivals.pop().synchronize()


Allocate = Callable[[int], torch.Tensor]
"""Bytes → page-aligned, untouched memory. Raises MemoryError, OSError or RuntimeError where there is none."""


class Arena:
    """
    A pool of slots within a budget. Safe to use from several threads.

    Args:
        host_nbytes: The budget; None: half of what is free, asked again at every growth.
        allocate: Where memory comes from.
        at_once: How many slots are taken with one allocation at most; None: as many as are needed.

    Where the system gives less than the budget allows, what it gave is the budget from then on, and a warning says so
    once. Memory is freed when the arena and its last slot are.
    """

    def __init__(
        self, host_nbytes: int | None = None, *, allocate: Allocate | None = None, at_once: int | None = None
    ) -> None:
        self._host_nbytes = host_nbytes
        self._allocate = allocate or pages
        self._at_once = at_once
        self._changed = threading.Condition()  # guards all below
        self._free: list[Slot] = []
        self._lost: set[Slot] = set()  # in the hands of threads that nobody waits for any more
        self._held = 0  # slots, those that a thread is just touching included
        self._ceiling: int | None = None  # set once the system refused memory
        self._prefaulting: threading.Thread | None = None
        self._is_stopped = False

    def capacity(self) -> int:
        """How many slots the arena may have, 1 at least."""
        with self._changed:
            return self._capacity()

    def _capacity(self) -> int:
        budget = self._host_nbytes
        if budget is None:
            budget = (self._held * SLOT_NBYTES + free_nbytes()) // 2
        slots = max(1, budget // SLOT_NBYTES, self._held if self._host_nbytes is None else 0)
        return slots if self._ceiling is None else max(1, min(slots, self._ceiling))

    def in_use(self) -> int:
        """How many slots are taken."""
        with self._changed:
            return self._held - len(self._free)

    def reserve(self, count: int) -> bool:
        """
        Grow until *count* slots are free, as far as the budget allows and the system gives.

        Returns:
            Whether *count* slots are there, those included that are in use now and will be given back.
        """
        with self._changed:
            if len(self._free) >= count:  # to ask the system what is free costs training a good part of a millisecond
                return True
            missing = min(self._held - len(self._free) + count, self._capacity()) - self._held
            if missing > 0:
                self._grow(missing)
            return self._held >= count

    def take(self, *, wanted: int) -> Slot:
        """
        A slot. Waits until one is given back if *wanted* slots, or as many as the budget allows, are there already.

        Raises:
            MemoryError: The system has no memory for a single slot.
        """
        with self._changed:
            while not self._free:
                missing = min(wanted, self._capacity()) - self._held
                if missing > 0:
                    self._grow(missing)
                else:
                    self._changed.wait()
            return self._free.pop()

    def give_back(self, slot: Slot) -> None:
        """Let others take *slot*, once nothing is on its way to it."""
        slot.wait()
        with self._changed:
            if slot in self._lost:
                self._lost.remove(slot)
                return
            self._free.append(slot)
            self._changed.notify_all()

    def lose(self, slot: Slot) -> None:
        """
        Count *slot* out: it is with a thread that may never give it back, and nobody else ever gets it.

        Others may take a fresh one in its place. If it is given back after all, its memory is freed; if it already was,
        nothing is lost.
        """
        with self._changed:
            if slot not in self._free:
                self._lost.add(slot)
                self._held -= 1
                self._changed.notify_all()

    def prefault(self, files: Collection[int]) -> None:
        """
        Take and touch memory for *files* of so many bytes in the background, as far as the budget allows.

        Returns at once. Every file begins in a slot of its own; of a slot no more is touched than the largest file has.
        """
        self.stop()
        wanted = sum(-(-nbytes // SLOT_NBYTES) for nbytes in files)
        with self._changed:
            missing = min(wanted, self._capacity()) - self._held
            if missing <= 0:
                return
            self._is_stopped = False
            self._prefaulting = threading.Thread(
                target=self._touch, args=(missing, min(max(files), SLOT_NBYTES)), name="ckptman-prefault", daemon=True
            )
        try:
            self._prefaulting.start()
        except RuntimeError:  # the interpreter is about to end
            self._prefaulting = None

    def stop(self) -> None:
        """End what ``prefault`` began; what was touched stays."""
        with self._changed:
            thread, self._prefaulting = self._prefaulting, None
            self._is_stopped = True
        if thread is not None:
            thread.join()

    def trim(self, slots: int) -> None:
        """Free memory until at most *slots* are held, as far as they are not in use."""
        self.stop()
        with self._changed:
            surplus = min(len(self._free), max(0, self._held - slots))
            del self._free[:surplus]
            self._held -= surplus

    def _touch(self, count: int, nbytes: int) -> None:
        for _ in range(count):
            with self._changed:
                if self._is_stopped or self._ceiling is not None:
                    return
                self._held += 1  # promised before it is there: who needs it waits for it
            slot = self._new(1)
            if slot:
                ctypes.memset(slot[0].tensor.data_ptr(), 0, nbytes)  # leaves the interpreter to others meanwhile
            with self._changed:
                self._held += len(slot) - 1
                if not slot:
                    self._refused()
                self._free += slot
                self._changed.notify_all()

    def _grow(self, count: int) -> None:
        """
        Take memory for *count* more slots; for a caller that holds the lock.

        Where that is refused, for half as many, and so on, and that is the end of growing: what is left of the
        system's memory is needed for threads and training.
        """
        wanted = count
        while count and not (slots := self._new(count)):
            count //= 2
        if count:
            self._free += slots
            self._held += count
        if count < wanted:
            self._refused()
        if self._held == 0:
            raise MemoryError(f"there is no memory for a staging buffer of {SLOT_NBYTES >> 20} MiB")

    def _new(self, count: int) -> list[Slot]:
        """All of *count* slots, or none."""
        slots: list[Slot] = []
        try:
            while len(slots) < count:
                part = min(count - len(slots), self._at_once or count)
                memory = self._allocate(part * SLOT_NBYTES)
                slots += [Slot(one, one.numpy().data) for one in torch.split(memory, SLOT_NBYTES)]
        except (MemoryError, OSError, RuntimeError):
            return []
        return slots

    def _refused(self) -> None:
        if self._ceiling is None:
            _log.warning(
                "the system has no more memory for staging than %d MiB: larger states are saved through a ring of that "
                "size, and save() then waits for the disk",
                self._held * SLOT_NBYTES >> 20,
            )
        self._ceiling = self._held


def pages(nbytes: int) -> torch.Tensor:
    """*nbytes* of untouched, page-aligned memory: huge pages where the system has them, not shared with children."""
    if sys.platform == "win32":
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a fork would make every page a copy, to be faulted again
        if hasattr(mmap, advice):
            memory.madvise(getattr(mmap, advice))
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_NBYTES
    return whole[start : start + nbytes]


def pinned(nbytes: int) -> torch.Tensor:
    """
    *nbytes* of page-locked memory, to and from which an accelerator copies by itself; `pages` where there is no more.

    Torch takes the next power of two, and keeps what is freed for the next who wants as much: ask for a slot at a time.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # the limit on locked memory is reached, or there is no accelerator
        _say_that_none_is_locked()
        return pages(nbytes)


@functools.cache
def _say_that_none_is_locked() -> None:
    _log.warning("the system gives no more page-locked memory: staging goes on with ordinary memory, which is slower")
