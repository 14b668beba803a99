"""Which checkpoint a Trainer continues, what it keeps, what it borrows, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("optuna")

from crash.accidents import in_child
from hugging_face_job import Job, gpt, listed, lora
from transformers import Trainer, TrainerCallback

from ckptman import (
    CheckpointManager,
    CheckpointNotFound,
    DamagedCheckpointWarning,
    IntegrityError,
    Preempted,
    StateMismatch,
    UnsupportedState,
    keep,
)
from ckptman.integrations.transformers import CkptmanTrainer

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "learning_rate": 0.5,
}


@pytest.fixture
def job(scratch: Path) -> Job:
    return Job(output=str(scratch / "output"))


def inside(act: Callable[[], object]) -> None:
    """Run *act* in a child: accelerate keeps global state that others should not inherit."""
    in_child(lambda tell: act())


def began(job: Job, root: Any, resume_from: Any = None, **options: Any) -> int:
    """At which step a run on *root* begins."""
    found: int = job.finish(root, resume_from=resume_from, **options)["began"]
    return found


def damage(root: Path, step: int, component: str) -> None:
    """Flip a bit in the middle of a file of *step*."""
    (path,) = root.glob(f"step-{step:012d}.*/{component}*.safetensors")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)


def test_each_way_to_resume_begins_where_it_says(job: Job, scratch: Path) -> None:
    """The words, a step, and what ``train(resume_from_checkpoint=…)`` makes of what plain scripts pass."""
    root = scratch / "root"
    inside(lambda: refused(job, root, "must", CheckpointNotFound, "no checkpoint"))
    assert job.run(root, kill_at=7).was_killed
    steps = [one.step for one in listed(root)]
    assert steps in ([2, 4], [2, 4, 6])
    with CheckpointManager(root, {"x": 1}) as manager:
        manager.tag(2, "best")
    for resume, begins in {"auto": steps[-1], "best": 2, 2: 2, "never": 0, "must": 8}.items():
        assert began(job, root, resume=resume) == begins, resume
    for resume_from, begins in {True: 8, 4: 4, "best": 2, "auto": 8, False: 0}.items():
        assert began(job, root, resume_from, resume="never") == begins, resume_from
    inside(lambda: refused(job, root, 77, CheckpointNotFound, "no step 77"))


def refused(job: Job, root: Any, resume: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        job.build(root, resume=resume).train()


def test_a_root_may_be_in_an_object_store(job: Job, scratch: Path, s3_server: Any) -> None:
    """With ``storage_options`` for its driver; what lies there is what lies on a disk."""
    root, options = "s3://bucket/hugging-face", {"storage_options": s3_server.options}
    whole = job.finish(root, **options)
    resumed = job.finish(root, resume=4, **options)
    assert resumed["began"] == 4
    assert resumed["equal"] == whole["equal"] == job.finish(scratch / "root")["equal"]


def test_a_fresh_start_in_an_old_root_is_resumed_itself(job: Job, scratch: Path) -> None:
    """After ``never``, the newest checkpoint is that of the new run, though its number is lower."""
    root = scratch / "root"
    job.finish(root)
    assert job.run(root, kill_at=5, resume="never").was_killed
    whole = job.finish(scratch / "whole")
    resumed = job.finish(root)
    assert resumed["began"] in (2, 4)
    assert resumed["equal"] == whole["equal"]


@pytest.mark.parametrize("component", ["model", "optimizer", "trainer"])
def test_damage_in_any_component_leads_to_the_older_checkpoint(component: str, job: Job, scratch: Path) -> None:
    """All of the state comes from one checkpoint: the newest one that is intact as a whole. And it is said."""
    root = scratch / "root"
    whole = job.finish(root)
    if component == "trainer":  # its values, and those of the ranks, are in the manifest
        (manifest,) = root.glob("step-000000000008.*/manifest.json")
        manifest.write_bytes(manifest.read_bytes()[:-9])
    else:
        damage(root, 8, component)

    def resume(tell: Callable[[str], None]) -> None:
        trainer = job.build(root)
        with pytest.warns(DamagedCheckpointWarning, match="step 8 .* passed over"):
            trainer.train()
        tell(str(trainer._initial_global_step))

    assert in_child(resume).told == ["6"]
    assert job.finish(root)["equal"] == whole["equal"]


def test_where_all_are_damaged_nothing_begins_afresh(job: Job, scratch: Path) -> None:
    """It raises; the word for a fresh start is ``never``."""
    root = scratch / "root"
    job.finish(root, keep=keep.last(1))
    damage(root, 8, "model")

    def resume() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused(job, root, "auto", IntegrityError, "resume='never'")

    inside(resume)
    assert began(job, root, resume="never") == 0


def test_another_model_is_refused_before_anything_is_touched(job: Job, scratch: Path) -> None:
    """The checkpoint of another model: every difference is named, no tensor has changed, nothing was saved."""
    root = scratch / "root"
    job.finish(root)
    before = listed(root)

    def resume() -> None:
        other = Job(output=job.output, model=lambda: gpt(width=32))
        trainer = other.build(root)
        weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        with pytest.raises(StateMismatch, match=r"transformer\.wte\.weight"):
            trainer.train()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())

    inside(resume)
    assert listed(root) == before


def test_the_limit_of_the_arguments_is_kept_to_and_the_best_one_too(scratch: Path) -> None:
    """``save_total_limit`` stands for ``keep.last``; ``keep`` overrides it; the best checkpoint is never pruned."""
    job = Job(output=str(scratch / "output"), options={**BEST, "save_total_limit": 1})
    best = job.finish(scratch / "limit")["best"]
    assert [one.step for one in listed(scratch / "limit")] == sorted({best, 8})
    assert [one.step for one in listed(scratch / "limit") if "best" in one.tags] == [best]
    job.finish(scratch / "keep", keep=keep.last(3))
    assert [one.step for one in listed(scratch / "keep")][-3:] == [4, 6, 8]
    assert {"loss", "eval_loss", "epoch"} <= listed(scratch / "keep")[-2].metrics.keys()


def test_the_frozen_base_of_an_adapter_is_written_once(scratch: Path) -> None:
    """Later checkpoints, those of a resumed run included, write the adapter and its moments only."""
    job = Job(output=str(scratch / "output"), model=lora)
    root = scratch / "root"
    assert job.run(root, kill_at=5).was_killed
    job.finish(root)
    new = [one.new_nbytes for one in listed(root)]
    assert len(new) == 4
    assert new[0] > 1_800_000
    assert all(nbytes < new[0] / 20 for nbytes in new[1:])
    assert all(one.nbytes > 1_800_000 for one in listed(root))


def test_each_trial_of_a_search_has_a_root_of_its_own_and_begins_afresh(job: Job, scratch: Path) -> None:
    """A second search, whose trials have the same numbers and other parameters, continues none of the first."""

    def search(rate: float) -> None:
        trainer = job.build(scratch / "root")
        trainer.model_init = lambda trial: gpt()
        trainer.hyperparameter_search(
            lambda trial: {"learning_rate": trial.suggest_float("learning_rate", rate, rate)},
            backend="optuna",
            n_trials=2,
            compute_objective=lambda metrics: 0.0,
        )
        assert trainer._initial_global_step == 0
        assert trainer.state.trial_params == {"learning_rate": rate}

    inside(lambda: [search(rate) for rate in (0.1, 0.2)])
    assert {path.name for path in (scratch / "root").iterdir()} == {"run-0", "run-1"}
    for name in ("run-0", "run-1"):
        assert [one.step for one in listed(scratch / "root" / name)] == [2, 4, 6, 8]


def test_a_directory_of_a_plain_trainer_is_continued_into_a_root(job: Job, scratch: Path) -> None:
    """``resume_from_checkpoint`` may be one; a partial one is refused with what is wrong with it."""
    plain = Job(output=job.output, trainer=Trainer)
    whole = plain.finish(None)
    directory = Path(job.output) / "checkpoint-4"
    state = directory / "trainer_state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "best_model_checkpoint": "C:\\runs\\a\\checkpoint-4"}))
    resumed = job.finish(scratch / "root", resume_from=str(directory))
    assert resumed["began"] == 4
    assert {**resumed["equal"], "losses": ""} == {
        **whole["equal"],
        "losses": "",
    }  # the Trainer forgets a part of a loss
    assert [one.step for one in listed(scratch / "root")] == [6, 8]

    (directory / "scheduler.pt").write_bytes(b"")

    def resume() -> None:
        with pytest.raises(IntegrityError, match=r"scheduler\.pt is empty or cut off"):
            job.build(scratch / "root").train(resume_from_checkpoint=str(directory))

    inside(resume)


REFUSED = {
    "push_to_hub": {"push_to_hub": True, "hub_model_id": "a/b"},
    "enable_jit_checkpoint": {"enable_jit_checkpoint": True},
    "save_only_model": {"save_only_model": True},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(what: str, scratch: Path) -> None:
    """Before anything is trained, and before anybody is talked to."""
    job = Job(output=str(scratch / "output"), options=REFUSED[what])

    def build() -> None:
        with pytest.raises(ValueError, match=f"ckptman: {what}"):
            job.build(scratch / "root")

    inside(build)


def test_wrong_arguments_are_refused(job: Job, scratch: Path) -> None:
    """A wrong word, a wrong rule, a root that cannot be opened."""

    def build() -> None:
        with pytest.raises(ValueError, match="resume must be one of 'auto'"):
            job.build(scratch / "root", resume="newest")
        with pytest.raises(TypeError, match=r"keep\.last"):
            job.build(scratch / "root", keep=3)
        with pytest.raises(ValueError, match="cannot be opened"):
            job.build("nothing://root")
        with pytest.raises(TypeError, match="root"):
            CkptmanTrainer(gpt())

    inside(build)


def test_a_state_of_a_callback_that_json_cannot_say_fails_the_save(job: Job, scratch: Path) -> None:
    """With the reason, from ``train()``; nothing is committed."""

    class Odd(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *rest: Any, **more: Any) -> None:
            state.log_history.append({"step": state.global_step, "odd": object()})

    def train() -> None:
        with pytest.raises(UnsupportedState, match=r"trainer\.state.*JSON"):
            Job(output=job.output, callbacks=lambda: [Odd()]).build(scratch / "root").train()

    inside(train)
    assert listed(scratch / "root") == []


class Terminate(TrainerCallback):
    """The scheduler of the cluster wants the machine, in the middle of step 5."""

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_notice_saves_the_step_that_is_under_way(job: Job, scratch: Path) -> None:
    """``train()`` leaves with exit code 75 once that is committed; the run goes on there; handlers are put back."""
    whole = job.finish(scratch / "whole")

    def train() -> None:
        trainer = Job(output=job.output, callbacks=lambda: [Terminate()]).build(scratch / "root")
        with pytest.raises(Preempted) as raised:
            trainer.train()
        assert (raised.value.code, raised.value.step) == (75, 5)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    inside(train)
    assert [one.step for one in listed(scratch / "root")] == [2, 4, 5]
    resumed = job.finish(scratch / "root")
    assert resumed["began"] == 5
    assert resumed["equal"] == whole["equal"]


def test_the_scale_of_the_gradients_is_restored(job: Job, scratch: Path) -> None:
    """The scaler of float16 training has a state; on a CPU one is put in its place by hand."""

    def train(tell: Callable[[str], None]) -> None:
        for scale in (256.0, 8.0):
            trainer = job.build(scratch / "root")
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            trainer.accelerator.scaler.scale(torch.zeros(1))
            trainer.train()
            tell(str(trainer.accelerator.scaler.get_scale()))

    assert in_child(train).told == ["256.0", "256.0"]
