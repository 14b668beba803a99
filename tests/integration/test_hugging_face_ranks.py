"""Two processes under DistributedDataParallel, started with the variables that torchrun sets."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from crash.accidents import Child
from hugging_face_job import Job, gpt, listed, outcome
from transformers import TrainerCallback

from ckptman import Preempted, SaveFailed, StateMismatch
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import FaultySystem, fail

RANKS = 2


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def on_all_ranks(act: Callable[[Callable[[str], None], int], object]) -> list[list[str]]:
    """Run ``act(tell, rank)`` in one child for each rank; return what each of them told before it ended or died."""
    port = free_port()

    def child(tell: Callable[[str], None], rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        act(tell, rank)
        torch.distributed.destroy_process_group()

    with ExitStack() as stack:
        children = [
            stack.enter_context(Child(lambda tell, rank=rank: child(tell, rank)))  # type: ignore[misc]
            for rank in range(RANKS)
        ]
        return [one.join() for one in children]


def run(job: Job, root: Any, **options: Any) -> list[list[str]]:
    def train(tell: Callable[[str], None], rank: int) -> None:
        trainer = job.build(root, **options)
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        tell(json.dumps(outcome(trainer)))

    return on_all_ranks(train)


def finish(job: Job, root: Any, **options: Any) -> list[dict[str, Any]]:
    told = run(job, root, **options)
    assert [len(lines) for lines in told] == [1] * RANKS
    return [json.loads(lines[0]) for lines in told]


@pytest.fixture
def job(scratch: Path) -> Job:
    return Job(output=str(scratch / "output"), options={"max_steps": 5, "ddp_backend": "gloo"})


def test_two_ranks_that_were_killed_end_as_two_that_were_not(job: Job, scratch: Path) -> None:
    """Each rank has its own random streams again, and both the same weights: as in a run that was never interrupted."""
    whole = finish(job, scratch / "whole")
    assert whole[0]["equal"]["weights"] == whole[1]["equal"]["weights"]
    assert run(job, scratch / "killed", kill_at=4) == [[]] * RANKS
    before = listed(scratch / "killed")
    resumed = finish(job, scratch / "killed")
    assert [one["equal"] for one in resumed] == [one["equal"] for one in whole]
    assert [one["began"] for one in resumed] == [before[-1].step if before else 0] * RANKS


class Terminate(TrainerCallback):
    """A notice that only the first rank gets."""

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        if state.global_step == 2 and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_notice_of_the_first_rank_is_that_of_all(job: Job, scratch: Path) -> None:
    """All leave at the same step, once it is committed."""

    def train(tell: Callable[[str], None], rank: int) -> None:
        with pytest.raises(Preempted) as raised:
            Job(output=job.output, options=job.options, callbacks=lambda: [Terminate()]).build(scratch / "root").train()
        tell(str(raised.value.step))

    assert on_all_ranks(train) == [["3"]] * RANKS
    assert [one.step for one in listed(scratch / "root")] == [2, 3]


def test_what_fails_on_the_first_rank_fails_on_all(job: Job, scratch: Path) -> None:
    """A full disk and another model: no rank is left waiting for the others."""

    def full(tell: Callable[[str], None], rank: int) -> None:
        system = FaultySystem(fail(40, 28, lasting=True)) if rank == 0 else FaultySystem()
        with pytest.raises(SaveFailed, match="No space left" if rank == 0 else "rank 0: .*No space left"):
            job.build(LocalStorage(scratch / "root", system=system)).train()
        tell("failed")

    assert on_all_ranks(full) == [["failed"]] * RANKS
    finish(job, scratch / "root")
    other = Job(output=job.output, model=lambda: gpt(width=32), options=job.options)

    def mismatched(tell: Callable[[str], None], rank: int) -> None:
        with pytest.raises(StateMismatch, match="wte"):
            other.build(scratch / "root").train()
        tell("failed")

    assert on_all_ranks(mismatched) == [["failed"]] * RANKS
