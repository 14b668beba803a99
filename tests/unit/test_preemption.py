"""Notices of all kinds, with clocks of our own; and how often ranks agree."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from ckptman import CheckpointManager, Preempted, Preemption
from ckptman.boundary import calls_between
from ckptman.preemption import Watch


class Clock:
    """Both clocks; they go on when told to."""

    def __init__(self) -> None:
        self.at = 1_000_000.0

    def __call__(self) -> float:
        return self.at

    def watch(self, preemption: Preemption, environ: Mapping[str, str] | None = None) -> Watch:
        return Watch(preemption, environ=environ or {}, now=self, clock=self)


def test_a_file_that_appears_is_a_notice(tmp_path: Path) -> None:
    """Listed once a second; its folder need not be there before; once noticed, always noticed."""
    clock, file = Clock(), tmp_path / "later" / "stop"
    watch = clock.watch(Preemption(file=file))
    clock.at += 5
    assert watch.look() is None
    file.parent.mkdir()
    file.touch()
    assert watch.look() is None, "not listed again within a second"
    clock.at += 1
    assert watch.look() == f"the file {file}"
    file.unlink()
    clock.at += 5
    assert watch.look() == f"the file {file}"


def test_a_file_of_the_last_time_is_no_notice_until_it_is_written_anew(tmp_path: Path) -> None:
    """Else a job that is started again would be stopped at its first step, again and again."""
    clock, file = Clock(), tmp_path / "stop"
    file.touch()
    watch = clock.watch(Preemption(file=str(file)))
    clock.at += 5
    assert watch.look() is None
    os.utime(file, ns=(7, 7))
    clock.at += 5
    assert watch.look() == f"the file {file}"
    again = clock.watch(Preemption(file=file))
    other = tmp_path / "other"
    other.touch()
    os.utime(other, ns=(7, 7))
    other.replace(file)
    clock.at += 5
    assert again.look() == f"the file {file}", "another one of the same age"


@pytest.mark.parametrize("kind", ["seconds", "datetime", "slurm"])
def test_a_deadline_is_a_notice_when_the_save_must_begin(kind: str) -> None:
    """``grace_s`` before it at the latest; earlier where saves or steps were longer: twice the longest of both."""
    clock = Clock()
    end = clock.at + 1000
    deadline = {"seconds": end, "datetime": datetime.fromtimestamp(end, UTC), "slurm": None}[kind]
    watch = clock.watch(Preemption(deadline=deadline), {"SLURM_JOB_END_TIME": f"{end:.0f}"} if kind == "slurm" else {})
    assert watch.look() is None
    clock.at = end - 31
    slow = clock.watch(Preemption(deadline=deadline), {"SLURM_JOB_END_TIME": f"{end:.0f}"} if kind == "slurm" else {})
    assert slow.look() is None
    slow.took(10.0)
    assert slow.look() is None, "20 s are still less than the grace"
    slow.took(16.0)
    assert slow.look() == "the deadline in 31 s"
    assert watch.look() == "the deadline in 31 s", "a step took 969 s: the next call would come too late"
    clock.at = end - 350
    uneven = clock.watch(Preemption(deadline=end))
    for step_s in (0, 100, 1):
        clock.at += step_s
        assert uneven.look() is None
    clock.at = end - 200
    assert uneven.look() == "the deadline in 200 s", "the longest step counts, not the last one"
    steady = clock.watch(Preemption(deadline=end))
    clock.at = end - 30
    assert steady.look() == "the deadline in 30 s"


def test_a_deadline_of_slurm_can_be_left_out_of_account(caplog: pytest.LogCaptureFixture) -> None:
    """By saying that there is none; and one that is over was extended, which the environment does not tell."""
    clock = Clock()
    soon = {"SLURM_JOB_END_TIME": f"{clock.at + 5:.0f}"}
    assert clock.watch(Preemption(), soon).look() == "the deadline in 5 s"
    assert clock.watch(Preemption(deadline=math.inf), soon).look() is None
    assert not caplog.records
    assert clock.watch(Preemption(), {"SLURM_JOB_END_TIME": f"{clock.at - 5:.0f}"}).look() is None
    assert "was given more time" in caplog.text
    assert clock.watch(Preemption(deadline=clock.at - 5)).look() == "the deadline in -5 s"
    assert clock.watch(Preemption(), {"SLURM_JOB_END_TIME": "UNLIMITED"}).look() is None


def test_a_save_that_takes_longer_than_the_grace_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """Once, when it is known; and again when a notice came and the last save begins."""
    caplog.set_level(logging.WARNING, "ckptman")
    clock = Clock()
    watch = clock.watch(Preemption(grace_s=30.0))
    watch.took(29.0)
    assert not caplog.records
    watch.took(45.0)
    watch.took(50.0)
    assert [record.message[:50] for record in caplog.records] == ["a save took 45 s, and a preemption notice leaves 3"]
    caplog.clear()
    fast = clock.watch(Preemption(grace_s=30.0))
    fast.took(20.0)
    fast.took(1.0)
    fast.signals.received = "SIGTERM"
    assert fast.look() == "SIGTERM"
    clock.at += 9
    fast.hear("SIGTERM")
    assert not caplog.records
    clock.at += 2
    fast.hear("SIGTERM")
    assert "a save took up to 20 s here, and about 19 s are left" in caplog.text
    caplog.clear()
    hurried = clock.watch(Preemption(deadline=clock.at + 15, grace_s=30.0))
    hurried.took(20.0)
    hurried.hear("SIGTERM")
    assert "about 15 s are left" in caplog.text, "the deadline comes before the grace is over"


def test_a_rank_that_hears_of_a_notice_from_another_counts_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    """It knows that the end is near, says the same in every later look, and its grace has begun."""
    clock = Clock()
    watch = clock.watch(Preemption(grace_s=30.0))
    watch.took(20.0)
    assert not watch.has_noticed
    watch.hear("SIGUSR1 (on rank 1)")
    assert watch.has_noticed
    assert watch.look() == "SIGUSR1 (on rank 1)"
    assert not caplog.records
    clock.at += 11
    watch.hear("SIGUSR1 (on rank 1)")
    assert "about 19 s are left" in caplog.text


def test_wrong_arguments_are_refused() -> None:
    for arguments, text in [
        ({"grace_s": -1}, "grace_s"),
        ({"grace_s": math.inf}, "grace_s"),
        ({"deadline": math.nan}, "nan"),
        ({"deadline": datetime(2026, 1, 1)}, "time zone"),
    ]:
        with pytest.raises(ValueError, match=text):
            Preemption(**arguments)
    with pytest.raises(TypeError, match="Preemption"):
        CheckpointManager("memory://wrong", {"x": torch.ones(1)}, preemption="stop")  # type: ignore[arg-type]


def test_a_deadline_saves_commits_and_exits_with_75(tmp_path: Path) -> None:
    """The whole way, alone: the manager saves, and says why."""
    notice = Preemption(deadline=1.0)
    with (
        pytest.raises(Preempted, match=r"the deadline in .* step 1 is saved") as caught,
        CheckpointManager(tmp_path, {"x": torch.ones(1)}, preemption=notice) as manager,
    ):
        manager.maybe_save(1)
    assert caught.value.code == 75
    latest = CheckpointManager(tmp_path).latest()
    assert latest is not None
    assert (latest.step, latest.preempted) == (1, True)


def test_training_off_the_main_thread_listens_to_no_signal_and_saves_all_the_same(tmp_path: Path) -> None:
    """Python lets only the main thread install handlers; a deadline is heard there too."""
    before = signal.getsignal(signal.SIGTERM)
    raised: list[BaseException] = []

    def train() -> None:
        try:
            with CheckpointManager(tmp_path, {"x": torch.ones(1)}, preemption=Preemption(deadline=1.0)) as manager:
                manager.maybe_save(1)
        except BaseException as error:  # noqa: BLE001 - Preempted ends threads in silence
            raised.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(30)
    assert [type(error) for error in raised] == [Preempted]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_that_was_put_on_top_stays_when_the_manager_closes(tmp_path: Path) -> None:
    """It may hand on to ours, which then does what was done before us."""
    heard: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("below"))
    try:
        with CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
            manager.maybe_save(1)
            ours = signal.getsignal(signal.SIGUSR1)
            assert callable(ours)
            on_top = lambda number, frame: (heard.append("on top"), ours(number, frame))
            signal.signal(signal.SIGUSR1, on_top)
        assert signal.getsignal(signal.SIGUSR1) is on_top
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == ["on top", "below"]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("step_s", "cost_s", "calls"),
    [
        (10.0, 0.001, 1),  # each step is a boundary
        (0.5, 0.001, 1),
        (0.1, 0.001, 5),  # every half a second
        (0.00001, 0.001, 100),  # not more: steps may become slower
        (0.1, 0.05, 25),  # a fiftieth of the time: every 2.5 s
        (0.001, 0.05, 2500),
        (6.0, 0.5, 1),  # at least every 10 s, whatever it costs
        (1.0, math.inf, 10),
    ],
)
def test_ranks_agree_as_often_as_it_is_cheap(step_s: float, cost_s: float, calls: int) -> None:
    assert calls_between(step_s, cost_s) == pytest.approx(calls, abs=1)
