"""Batches drawn with random numbers, as in masked language modelling: the same after a resume in mid-epoch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from hugging_face_job import Job, Tokens, listed

from ckptman.integrations.transformers import CkptmanTrainer


class Noisy(Tokens):
    """Each example is shifted by a random number, as an augmentation would."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (super().__getitem__(index)["input_ids"] + random.randrange(3)) % 40
        return {"input_ids": row, "labels": row}


class RandomBatches(CkptmanTrainer):
    """Masks tokens at random in the collator, and takes random examples."""

    def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any) -> None:
        super().__init__(*args, train_dataset=Noisy(len(train_dataset)), data_collator=masked, **kwargs)


def masked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    inputs = torch.stack([row["input_ids"] for row in rows])
    inputs = inputs.masked_fill(torch.bernoulli(torch.full(inputs.shape, 0.3)).bool(), int(np.random.randint(40)))
    return {"input_ids": inputs, "labels": torch.stack([row["labels"] for row in rows])}


@pytest.mark.parametrize(
    "options",
    [
        {"eval_strategy": "steps", "eval_steps": 2},
        {"gradient_accumulation_steps": 2, "save_steps": 1},
        {"save_steps": 5},
    ],
    ids=["evaluated", "accumulated", "before the last batch"],
)
def test_random_batches_go_on_as_they_would_have(options: dict[str, Any], scratch: Path) -> None:
    """Six batches an epoch: whichever checkpoint is resumed, in mid-epoch or at its end, the run ends with its bits."""
    job = Job(output=str(scratch / "output"), trainer=RandomBatches, options=options)
    root = scratch / "root"
    whole = job.finish(root)
    for step in [one.step for one in listed(root)][:3]:
        resumed = job.finish(root, resume=step)
        assert resumed["began"] == step
        assert resumed["equal"] == whole["equal"], step


def test_a_killed_run_with_random_batches_ends_bit_identical(scratch: Path) -> None:
    """The same command line after SIGKILL in mid-epoch."""
    job = Job(output=str(scratch / "output"), trainer=RandomBatches)
    whole = job.finish(scratch / "whole")
    assert job.run(scratch / "root", kill_at=5).was_killed
    resumed = job.finish(scratch / "root")
    assert resumed["began"] in (2, 4)
    assert resumed["equal"] == whole["equal"]
