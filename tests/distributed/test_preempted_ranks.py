"""One rank's notice is all ranks' notice: all save the same step, wait for the commit, and leave with 75."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fleet import run

from ckptman import (
    CheckpointManager,
    Coordinator,
    FilesCoordinator,
    Preempted,
    Preemption,
    RankLost,
    SaveFailed,
    TorchCoordinator,
    boundary,
)

TRAINING = Path(__file__).with_name("training_ranks.py")


def _preempted(rank: int, root: str, how: str, through_files: bool) -> dict[str, Any]:
    """Trains in step with the others where there is a group, at its own pace where there is none."""
    file = Path(root).parent / "stop"
    told = Preemption(file=file, deadline=time.time() + 1.0 if how == "deadline" and rank == 1 else None, grace_s=0.0)
    ranks = FilesCoordinator(root, rank=rank, world_size=3, job="a") if through_files else None
    boundary.MAX_INTERVAL_S = 1.0  # rather than 10: for this process, a child
    weights = torch.zeros(4)
    with CheckpointManager(root, {"weights": weights}, preemption=told, coordinator=ranks) as manager:
        for step in range(1, 100_000):
            if through_files:
                time.sleep(0.002 * (1 + rank))
            else:
                dist.all_reduce(torch.ones(1))
            weights += 1
            if step == 20 and rank == 1:
                if how == "signal":
                    os.kill(os.getpid(), signal.SIGUSR1)
                if how == "file":
                    file.touch()
            try:
                manager.maybe_save(step)
            except Preempted as error:
                return {"step": step, "code": error.code, "text": str(error), "weight": weights[0].item()}
    raise AssertionError("nobody was preempted")


def _checked(found: list[dict[str, Any]], root: Path, how: str) -> None:
    assert found[0] == found[1] == found[2]
    assert found[0]["code"] == 75
    kind = {"signal": "SIGUSR1", "file": "the file ", "deadline": "the deadline in "}[how]
    assert found[0]["text"].startswith(kind)
    step = found[0]["step"]
    assert found[0]["weight"] == step
    said = subprocess.run(
        [sys.executable, "-m", "ckptman", "latest", str(root), "--json"], capture_output=True, text=True, check=True
    )
    document = json.loads(said.stdout)
    assert (document["step"], document["preempted"], document["world_size"]) == (step, True, 3)
    assert not (root / "ranks").exists()


@pytest.mark.parametrize("how", ["signal", "file", "deadline"])
def test_a_notice_to_one_rank_stops_all_at_one_step(tmp_path: Path, how: str) -> None:
    """A signal, a file or a deadline that only rank 1 sees, in the middle of a training with collectives."""
    root = tmp_path / "root"
    found = run(tmp_path, 3, _preempted, str(root), how, False)
    _checked(found, root, how)
    if how != "file":  # which every rank sees
        assert "(on rank 1, host " in found[0]["text"]


def test_ranks_without_a_process_group_stop_at_one_step_too(tmp_path: Path) -> None:
    """They train at different paces and share nothing but the root."""
    root = tmp_path / "root"
    found = run(tmp_path, 3, _preempted, str(root), "signal", True, group=False)
    _checked(found, root, "signal")


def _by_the_clock(rank: int, root: str) -> list[int]:
    saved: list[int] = []
    x = torch.zeros(2)
    every = lambda step, seconds: seconds >= 0.2
    with CheckpointManager(root, {"x": x}, save_every=every, preemption=Preemption(grace_s=5)) as manager:
        for step in range(1, 400):
            dist.all_reduce(torch.ones(1))
            time.sleep(0.002 * (1 + (step + rank) % 2))
            if manager.maybe_save(step) is not None:
                saved.append(step)
        manager.wait()
        listed = [checkpoint.step for checkpoint in manager.checkpoints()]
        dist.barrier()
    assert listed == saved
    return saved


def test_a_schedule_by_the_clock_saves_the_same_steps_on_all_ranks(tmp_path: Path) -> None:
    """Though their clocks run apart: rank 0's is the one."""
    first, second = run(tmp_path, 2, _by_the_clock, str(tmp_path / "root"))
    assert first == second
    assert len(first) >= 2


def _apart(rank: int, root: str) -> list[str]:
    said: list[str] = []
    ranks = TorchCoordinator(silence_s=2.0)
    with CheckpointManager(root, {"x": torch.zeros(2)}, coordinator=ranks) as manager:
        for step in (1 + rank, 5, 6):
            if step == 6 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                manager.maybe_save(step)
                said.append("nothing")
            except SaveFailed as error:
                cause = error.__cause__
                said.append(f"{error} / {list(cause.ranks) if isinstance(cause, RankLost) else cause}")
            while manager._boundary._next > 1:  # until the next call is a boundary again
                manager._boundary._next = 1
    return said


def test_ranks_at_different_steps_and_a_lost_one_are_said_to_all(tmp_path: Path) -> None:
    """Both as SaveFailed, and at once rather than in the middle of a save."""
    first, killed, third = run(tmp_path, 3, _apart, str(tmp_path / "root"))
    assert killed is None
    assert first == third
    assert "different steps on different ranks (rank 0: 1, rank 1: 2, rank 2: 3)" in first[0]
    assert first[1] == "nothing"
    assert "rank 1 (host" in first[2]
    assert first[2].endswith("/ [1]")


class Interrupting:
    """A coordinator that gets Ctrl-C for its process as soon as it has the answer numbered *at*; it notes all steps."""

    def __init__(self, ranks: Coordinator, at: int) -> None:
        self.rank, self.world_size, self.host = ranks.rank, ranks.world_size, ranks.host
        self.steps: list[int] = []
        self._ranks = ranks
        self._at = at

    def agree(self, value: bytes) -> list[bytes]:
        votes = self._ranks.agree(value)
        self.steps.append(json.loads(votes[0])["step"])
        if len(self.steps) == self._at:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # the main thread is not here
        return votes


def _interrupted(rank: int, root: str, victim: int) -> dict[str, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found: dict[str, Any] = {"interrupts": 0}
    boundary.INTERVAL_S, boundary.SHARE = 0.1, 1.0  # often, also on a busy machine: for this process, a child
    ranks = TorchCoordinator(patience_s=5)
    with CheckpointManager(root, {"x": torch.zeros(2)}, coordinator=ranks) as manager:
        asked = Interrupting(manager._boundary._coordinator, 3 if rank == victim else 0)
        manager._boundary._coordinator = asked  # type: ignore[assignment]
        for step in range(1, 150):
            dist.all_reduce(torch.ones(1))
            time.sleep(0.005)
            try:
                manager.maybe_save(step)
            except KeyboardInterrupt:
                found["interrupts"] += 1
        found["steps"] = asked.steps
        dist.barrier()
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_interrupted_in_an_agreement_asks_when_the_others_do(tmp_path: Path, victim: int) -> None:
    """Ctrl-C that the program catches, with the answer on its way: nobody waits for the other in training."""
    found = run(tmp_path, 2, _interrupted, str(tmp_path / "root"), victim)
    assert [one["interrupts"] for one in found] == [rank == victim for rank in range(2)]
    assert found[0]["steps"] == found[1]["steps"]
    assert len(found[0]["steps"]) > 5


def _cost(rank: int, root: str) -> tuple[float, float]:
    with CheckpointManager(root, {"x": torch.zeros(2)}) as manager:
        times = []
        for step in range(1, 2000):
            began = time.perf_counter()
            manager.maybe_save(step)
            times.append(time.perf_counter() - began)
        dist.barrier()
    return sum(times) / len(times), max(times)


def test_torchrun_hands_on_a_notice(tmp_path: Path) -> None:
    """SIGTERM to the agent: all ranks save one step and end with 75."""
    root, out = tmp_path / "root", tmp_path / "out"
    out.mkdir()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    agent = subprocess.Popen(
        [sys.executable, *command, str(TRAINING), str(root), str(out)],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        ends_at = time.monotonic() + 200
        while not (out / "begun-0").exists() or not (out / "begun-1").exists():
            assert agent.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < ends_at
            time.sleep(0.05)
        agent.send_signal(signal.SIGTERM)
        while not all((out / f"end-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < ends_at, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        agent.wait(60)
    finally:
        agent.kill()
    ended = [json.loads((out / f"end-{rank}").read_text()) for rank in range(2)]
    assert ended[0] == ended[1]
    assert ended[0]["code"] == 75
    assert ended[0]["text"].startswith("SIGTERM")
    latest = CheckpointManager(root).latest()
    assert latest is not None
    assert (latest.step, latest.preempted, latest.world_size) == (ended[0]["step"], True, 2)


if __name__ == "__main__":  # PYTHONPATH=. python tests/distributed/test_preempted_ranks.py: what maybe_save costs
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        mean, worst = run(Path(folder), 4, _cost, f"{folder}/root")[0]
        print(f"maybe_save on 4 ranks, nothing to be done: mean {1e6 * mean:.1f} us, worst {1e3 * worst:.2f} ms")
