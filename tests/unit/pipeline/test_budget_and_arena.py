"""Memory for staging: within the budget, touched ahead, kept, and less than wished for where the system has none."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from ckptman import Limits
from ckptman.pipeline.arena import SLOT_NBYTES, Arena, Slot, pages
from ckptman.pipeline.budget import free_nbytes, reading_threads


def test_limits_refuse_what_makes_no_sense() -> None:
    """Every wrong number is named, before anything is done."""
    for wrong in ({"host_nbytes": 0}, {"io_threads": 0}, {"in_flight": 0}, {"in_flight": True}, {"io_threads": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)  # type: ignore[arg-type]


def test_ranks_of_a_host_share_its_reading_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as one rank would start, or one for each core: (cores, ranks here) → threads of each, of 4 wished for."""
    expected = {(2, 1): 4, (2, 2): 2, (2, 4): 1, (2, 64): 1, (64, 1): 4, (64, 8): 4, (64, 32): 2, (None, 4): 1}
    for (cores, ranks_here), threads in expected.items():
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert reading_threads(4, ranks_here) == threads


def test_free_memory_is_the_least_of_machine_and_cgroups(tmp_path: Path) -> None:
    """The machine says 8 GiB; a group above ours has 1 GiB left, ours has no limit of its own."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8388608 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/jobs/one\n")
    assert free_nbytes(proc=tmp_path / "proc", cgroups=tmp_path / "cgroup") == 8 << 30
    (tmp_path / "cgroup/jobs/one").mkdir(parents=True)
    (tmp_path / "cgroup/jobs/one/memory.max").write_text("max\n")
    (tmp_path / "cgroup/jobs/one/memory.current").write_text("5\n")
    (tmp_path / "cgroup/jobs/memory.max").write_text(f"{3 << 30}\n")
    (tmp_path / "cgroup/jobs/memory.current").write_text(f"{2 << 30}\n")
    assert free_nbytes(proc=tmp_path / "proc", cgroups=tmp_path / "cgroup") == 1 << 30
    (tmp_path / "proc/self/cgroup").write_text("7:cpu,memory:/x\n")
    (tmp_path / "cgroup/memory/x").mkdir(parents=True)
    (tmp_path / "cgroup/memory/x/memory.limit_in_bytes").write_text(f"{1 << 20}\n")
    (tmp_path / "cgroup/memory/x/memory.usage_in_bytes").write_text("0\n")
    assert free_nbytes(proc=tmp_path / "proc", cgroups=tmp_path / "cgroup") == 1 << 20
    assert free_nbytes(proc=tmp_path / "nothing", cgroups=tmp_path) > 0


def test_slots_are_aligned_distinct_and_reused() -> None:
    """No more than wanted are made, each begins on a page, and what was given back comes again."""
    arena = Arena(4 * SLOT_NBYTES)
    slots = [arena.take(wanted=2) for _ in range(2)]
    assert len({slot.tensor.data_ptr() for slot in slots}) == 2
    assert all(slot.tensor.data_ptr() % 4096 == 0 and len(slot.view) == SLOT_NBYTES for slot in slots)
    arena.give_back(slots[0])
    assert arena.take(wanted=2) is slots[0]


def test_who_needs_a_slot_beyond_the_budget_waits_for_one() -> None:
    """With a budget of one slot the second taker gets the first one's, once it is given back."""
    arena = Arena(SLOT_NBYTES)
    first = arena.take(wanted=9)
    got: list[object] = []
    taker = threading.Thread(target=lambda: got.append(arena.take(wanted=9)))
    taker.start()
    assert not got
    arena.give_back(first)
    taker.join(30)
    assert got == [first]


def test_a_lost_slot_makes_room_for_another_and_is_never_taken_again() -> None:
    """Who waits for it gets a fresh one; it is dropped when it comes back; one that is free cannot be lost."""
    arena = Arena(SLOT_NBYTES)
    lost = arena.take(wanted=9)
    got: list[Slot] = []
    taker = threading.Thread(target=lambda: got.append(arena.take(wanted=9)))
    taker.start()
    arena.lose(lost)
    taker.join(30)
    assert len(got) == 1
    assert got[0] is not lost
    arena.give_back(lost)
    arena.give_back(got[0])
    arena.lose(got[0])
    assert arena.take(wanted=9) is got[0]
    assert (arena.in_use(), arena._held, arena._lost) == (1, 1, set())


def test_prefault_touches_memory_ahead_and_can_be_stopped() -> None:
    """What was touched counts as held and is used first, a slot for the end of each file; stop joins the thread."""
    arena = Arena(8 * SLOT_NBYTES)
    arena.prefault([2 * SLOT_NBYTES - 5, 7])
    slots = [arena.take(wanted=3) for _ in range(3)]  # waits for the thread, and makes none besides
    assert len({slot.tensor.data_ptr() for slot in slots}) == 3
    arena.stop()
    assert not [t for t in threading.enumerate() if t.name == "ckptman-prefault"]
    for slot in slots:
        arena.give_back(slot)
    arena.trim(1)
    assert arena._held == 1


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "no memory"), RuntimeError("cannot pin")])
def test_a_system_without_memory_gives_a_smaller_ring_said_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 8 slots wished for, 4 are refused too, 2 are given: that is the capacity from then on, said by one warning."""
    left = 3

    def allocate(nbytes: int) -> torch.Tensor:
        nonlocal left
        if nbytes // SLOT_NBYTES > left:
            raise error
        left -= nbytes // SLOT_NBYTES
        return pages(nbytes)

    arena = Arena(8 * SLOT_NBYTES, allocate=allocate)
    with caplog.at_level(logging.WARNING):
        slots = [arena.take(wanted=8) for _ in range(2)]
        done = threading.Thread(target=lambda: arena.take(wanted=8))
        done.start()
        arena.give_back(slots.pop())
        done.join(30)
    assert arena.capacity() == 2
    assert len(caplog.records) == 1
    assert "32 MiB" in caplog.text
    arena.give_back(slots.pop())
    arena.trim(1)
    left = 0
    assert not arena.reserve(2), "which is refused again"
    assert arena.capacity() == 1
    assert len(caplog.records) == 1


def test_no_memory_at_all_is_an_error() -> None:
    """Not even one slot: MemoryError, instead of waiting for ever."""

    def allocate(nbytes: int) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError, match="16 MiB"):
        Arena(SLOT_NBYTES, allocate=allocate).take(wanted=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_make_the_next_copies_fault() -> None:
    """Slots are not shared with children, so they stay this process's own memory: no fault when written again."""
    import resource

    arena = Arena(SLOT_NBYTES)
    slot = arena.take(wanted=1)
    slot.tensor.fill_(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    slot.tensor.fill_(2)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    os.write(write, b"x")
    os.waitpid(child, 0)
    assert faults < 100
