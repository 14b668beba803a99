"""The Trainer of transformers with ckptman's checkpoints: it is killed, run again, and nobody can tell."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from hugging_face_job import Job, gpt, listed, lora
from transformers import EarlyStoppingCallback, Seq2SeqTrainingArguments, Trainer

from ckptman import CheckpointManager, keep
from ckptman.convert import export_checkpoint
from ckptman.integrations.transformers import CkptmanMixin, CkptmanSeq2SeqTrainer
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import FaultySystem, sigkill

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "save_total_limit": 1,
    "learning_rate": 0.5,
}


class HalfTheLoss(Trainer):
    """A subclass of a user's own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return (loss[0] / 2, *loss[1:]) if isinstance(loss, tuple) else loss / 2


class OfTheUser(CkptmanMixin, HalfTheLoss):
    pass


def half() -> Any:
    return gpt().to(torch.bfloat16)


JOBS = {
    "plain": (Job, {}, (1, 7)),
    "gradient accumulation": (Job, {"options": {"gradient_accumulation_steps": 2, "save_steps": 1}}, (4,)),
    "epochs": (Job, {"options": {"save_strategy": "epoch", "max_steps": 14}}, (13,)),
    "best model": (Job, {"options": BEST}, (7,)),
    "best model only": (Job, {"options": {**BEST, "save_strategy": "best"}}, (8,)),
    "early stopping": (
        Job,
        {
            "options": {**BEST, "max_steps": 40, "restore_callback_states_from_checkpoint": True},
            "callbacks": lambda: [EarlyStoppingCallback(early_stopping_patience=2)],
        },
        (9,),
    ),
    "LoRA": (Job, {"model": lora}, (5,)),
    "Seq2SeqTrainer": (Job, {"trainer": CkptmanSeq2SeqTrainer, "arguments": Seq2SeqTrainingArguments}, (5,)),
    "a user's subclass": (Job, {"trainer": OfTheUser}, (5,)),
    "bfloat16": (Job, {"model": half}, (5,)),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_run_that_was_killed_ends_as_one_that_was_not(name: str, scratch: Path) -> None:
    """
    Killed between two steps and started again, a run ends with the same weights, moments, schedule, losses, random
    streams and best metric, bit for bit; and it did not begin afresh, where there was a checkpoint.
    """
    job_class, settings, kills = JOBS[name]
    job = job_class(output=str(scratch / "output"), **settings)
    whole = job.finish(scratch / "whole")
    for kill_at in kills:
        root = scratch / f"killed-{kill_at}"
        assert job.run(root, kill_at=kill_at).was_killed
        before = listed(root)
        resumed = job.finish(root)
        assert resumed["equal"] == whole["equal"]
        assert resumed["step"] == whole["step"]
        assert resumed["began"] == (before[-1].step if before else 0)
    if name in ("plain", "best model"):
        assert job.finish(root)["equal"] == whole["equal"], "a run that has ended trains no further"
    assert not any(path.name.startswith("checkpoint-") for path in (scratch / "output").glob("*"))


def test_a_checkpoint_becomes_a_directory_that_from_pretrained_loads(scratch: Path) -> None:
    """The Trainer's checkpoints hold the model's configuration too: nothing else is needed."""
    Job(output=str(scratch / "output")).finish(scratch / "root")
    export_checkpoint(scratch / "root", "latest", scratch / "exported", to="hf")
    model = type(gpt()).from_pretrained(scratch / "exported")
    live = gpt()
    CheckpointManager(scratch / "root", {"model": live}, rng=False).restore(only=["model"])
    for (name, one), other in zip(live.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


MOMENTS = 8


@pytest.mark.timeout(240)
def test_a_run_that_was_killed_at_any_moment_of_a_save_ends_as_one_that_was_not(scratch: Path) -> None:
    """Killed at a random change of the disk, in the background of the training: as above, from what was committed."""
    job = Job(output=str(scratch / "output"), options={"max_steps": 6, "save_steps": 1})
    rule = keep.last(2)
    system = FaultySystem()
    counting = scratch / "counting"

    whole = job.finish(LocalStorage(scratch / "whole"), keep=rule)
    calls = _calls(job, counting, system, rule)
    assert calls > 60, "six saves change the disk more often than that"
    chosen = random.Random(6)
    began = []
    for at in sorted(chosen.sample(range(1, calls + 1), MOMENTS)):
        root = scratch / f"at-{at}"
        moment = chosen.choice(["before", "torn", "after"])
        fate = job.run(LocalStorage(root, system=FaultySystem(sigkill(at, moment=moment))), keep=rule)
        before = listed(root) if fate.was_killed else []
        resumed = job.finish(root, keep=rule)
        assert resumed["equal"] == whole["equal"], f"killed {moment} call {at} of {calls}"
        if fate.was_killed:
            began.append(resumed["began"])
            assert resumed["began"] == (before[-1].step if before else 0)
        assert [one.step for one in listed(root)] == [5, 6]
    print(f"{len(began)} kills in mid-save, resumed from steps {sorted(set(began))}, 0 differences")
    assert len(began) >= MOMENTS - 2, "a count differs a little from run to run, since training goes on beside it"
    assert len(set(began)) > 2


def _calls(job: Job, root: Path, system: FaultySystem, rule: Any) -> int:
    """How many times an uninterrupted run changes the disk."""
    from crash.accidents import in_child

    def train(tell: Any) -> None:
        job.build(LocalStorage(root, system=system), keep=rule).train()
        tell(str(len(system.calls)))

    return int(in_child(train).told[-1])
