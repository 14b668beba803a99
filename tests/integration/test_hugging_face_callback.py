"""The mirror of a plain Trainer: what it wrote is kept, and comes back as a directory that resumes."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from crash.accidents import in_child
from hugging_face_job import Job, listed, lora
from transformers import Trainer

from ckptman import CheckpointManager, CheckpointNotFound, FormatError, keep
from ckptman.integrations.transformers import CkptmanCallback, fetch, find_last_checkpoint


def mirrored(scratch: Path, **settings: object) -> Job:
    """A plain Trainer whose rotation keeps one directory, with a mirror that keeps three."""
    return Job(
        output=str(scratch / "output"),
        trainer=Trainer,
        callbacks=lambda: [CkptmanCallback(scratch / "root", keep=keep.last(3))],
        options={"save_total_limit": 1, "logging_steps": 2},
        **settings,  # type: ignore[arg-type]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("settings", [{}, {"model": lora}], ids=["plain", "LoRA"])
def test_a_plain_trainer_resumes_from_what_its_mirror_kept(settings: dict[str, object], scratch: Path) -> None:
    """Killed, and its output directory lost: it ends as a run that was never interrupted, as plain as it is."""
    whole = Job(output=str(scratch / "whole"), trainer=Trainer, options={"logging_steps": 2}, **settings).finish(None)  # type: ignore[arg-type]
    job = mirrored(scratch, **settings)
    assert fetch(scratch / "root", scratch / "resume") is None
    assert job.run(None, kill_at=7).was_killed
    last = Path(job.output) / "checkpoint-6"
    written = contents(last)
    shutil.rmtree(job.output)

    (scratch / "resume" / "checkpoint-6").mkdir(parents=True)
    (scratch / "resume" / "checkpoint-6" / "half").write_text("what a fetch left that was killed")
    directory = fetch(scratch / "root", scratch / "resume")
    assert directory == find_last_checkpoint(scratch / "resume") == str(scratch / "resume" / "checkpoint-6")
    assert contents(Path(directory)) == written
    resumed = job.finish(None, resume_from=directory)
    assert resumed["began"] == 6
    assert resumed["equal"] == whole["equal"]
    assert [one.step for one in listed(scratch / "root")] == [4, 6, 8]
    assert [path.name for path in Path(job.output).glob("checkpoint-*")] == ["checkpoint-8"], "rotation went on beside"


def test_a_damaged_copy_is_passed_over_and_a_missing_one_is_said(scratch: Path) -> None:
    """The older copy comes back, not the damaged one; a step that is not there is an error."""
    job = mirrored(scratch)
    job.finish(None)
    (file,) = scratch.glob("root/step-000000000008.*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fetch(scratch / "root", scratch / "resume") == str(scratch / "resume" / "checkpoint-6")
    assert fetch(scratch / "root", scratch / "resume", which=4) == str(scratch / "resume" / "checkpoint-4")
    with pytest.raises(CheckpointNotFound, match="no step 2"):
        fetch(scratch / "root", scratch / "resume", which=2)


def test_only_copies_are_fetched_and_none_reaches_out_of_its_directory(scratch: Path) -> None:
    """Another checkpoint is refused, and so is a name that leads elsewhere; nothing is written."""
    with CheckpointManager(scratch / "other", {"x": 1}) as manager:
        manager.save(1, block=True)
    with pytest.raises(FormatError, match="CkptmanTrainer"):
        fetch(scratch / "other", scratch / "resume")
    for name in ("../evil", "/evil", "a/../../evil", "C:evil", "..\\evil"):
        with CheckpointManager(scratch / "evil", {"files": {name: np.zeros(9, "u1")}}, rng=False) as m:
            m.save(1, block=True)
        with pytest.raises(FormatError, match="no name of a file"):
            fetch(scratch / "evil", scratch / "resume")
    assert list(scratch.glob("resume/*")) == []
    assert not (scratch / "evil" / "evil").exists()


def test_a_directory_that_is_not_where_it_should_be_fails_the_run(scratch: Path) -> None:
    """A trainer that saves elsewhere is told so, at its first save."""
    job = mirrored(scratch)

    def train(tell: Callable[[str], None]) -> None:
        trainer = job.build(None)
        trainer._get_output_dir = lambda trial: str(scratch / "elsewhere")
        with pytest.raises(Exception, match=r"checkpoint-2 is not there"):
            trainer.train()
        tell("said")

    assert in_child(train).told == ["said"]
