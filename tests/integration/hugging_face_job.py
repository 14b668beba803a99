"""Fine-tuning jobs with the Trainer of transformers, small enough to be run, killed and resumed many times."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from crash.accidents import Fate, in_child
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

from ckptman.format.values import to_json
from ckptman.integrations.transformers import CkptmanTrainer

transformers.logging.set_verbosity_error()

TIMINGS = ("runtime", "per_second", "train_loss")  # of one process, not of the run


class Tokens(torch.utils.data.Dataset):
    """*count* rows of eight random tokens, always the same ones."""

    def __init__(self, count: int) -> None:
        self._rows = torch.randint(0, 40, (count, 8), generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def gpt(width: int = 16, vocabulary: int = 40) -> GPT2LMHeadModel:
    """A GPT-2 with dropout, and tied weights as always; randomly initialised, always the same one."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=8, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def lora() -> Any:
    """An adapter on a frozen base of 1.9 MB."""
    from peft import LoraConfig, TaskType, get_peft_model

    base = gpt(width=128, vocabulary=2000)
    torch.manual_seed(1)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_dropout=0.1, target_modules=["c_attn"])
    return get_peft_model(base, config)


class KillAt(TrainerCallback):
    """Kills the process at the end of a step, before this step is logged, evaluated or saved."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command line: started twice with the same *root*, it is the same command line."""

    output: str
    model: Callable[[], Any] = gpt
    trainer: type = CkptmanTrainer
    arguments: type = TrainingArguments
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    callbacks: Callable[[], list[TrainerCallback]] = list

    def build(self, root: Any, *, kill_at: int | None = None, **options: Any) -> Any:
        args = self.arguments(
            output_dir=self.output,
            **{
                "max_steps": 8,
                "per_device_train_batch_size": 4,
                "save_steps": 2,
                "logging_steps": 3,
                "learning_rate": 0.02,
                "seed": 3,
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                **self.options,
            },
        )
        callbacks = self.callbacks() + ([KillAt(kill_at)] if kill_at else [])
        trainer = self.trainer(
            self.model(),
            args,
            train_dataset=Tokens(24),
            eval_dataset=Tokens(8),
            callbacks=callbacks,
            **({} if root is None else {"root": root}),
            **options,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def run(self, root: Any, *, kill_at: int | None = None, resume_from: Any = None, **options: Any) -> Fate:
        """Train in a child, which tells `outcome` at the end."""

        def train(tell: Callable[[str], None]) -> None:
            warnings.simplefilter("ignore")
            trainer = self.build(root, kill_at=kill_at, **options)
            trainer.train(resume_from_checkpoint=resume_from)
            tell(json.dumps(outcome(trainer)))

        return in_child(train)

    def finish(self, root: Any, **options: Any) -> dict[str, Any]:
        """Train to the end, and return the `outcome`."""
        fate = self.run(root, **options)
        assert len(fate.told) == 1
        told: dict[str, Any] = json.loads(fate.told[0])
        return told


def outcome(trainer: Any) -> dict[str, Any]:
    """Where the run ended, and the digests of all that must be equal in a run that was never interrupted."""
    state = trainer.state
    history = [
        {key: value for key, value in sorted(entry.items()) if not key.endswith(TIMINGS)} for entry in state.log_history
    ]
    streams = [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist()]
    return {
        "began": trainer._initial_global_step,
        "step": state.global_step,
        "best": state.best_global_step,
        "train_loss": state.log_history[-1]["train_loss"],
        "equal": {
            "weights": _digest(trainer.model.state_dict()),
            "moments": _digest(trainer.optimizer.state_dict()["state"]),
            "schedule": _digest([trainer.lr_scheduler.state_dict()["last_epoch"], trainer.lr_scheduler.get_last_lr()]),
            "losses": _digest(history),
            "streams": _digest(streams),
            "best": _digest([state.best_metric, state.best_global_step]),
            "flos": _digest(state.total_flos),
        },
    }


def _digest(tree: Any) -> str:
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, part in value.items():
                found.update(f"{key}:".encode())
                add(part)
        elif isinstance(value, np.ndarray):
            found.update(value.tobytes())
        else:
            found.update(to_json(value, ""))

    add(tree)
    return found.hexdigest()[:16]


def listed(root: Path) -> list[Any]:
    """The checkpoints of *root*, oldest commit first."""
    from ckptman import CheckpointManager

    return CheckpointManager(root).checkpoints()
