"""
What a resumed run gets back: each framework alone, and with ckptman, measured.

    python -m benchmarks.restored [--only Lightning] [--out restored.json]

Each run trains a bfloat16 model with float32 moments for a few steps, and saves within an epoch. What the next step
meets is compared, bit for bit, with what it meets in a run of fresh objects and other seeds that was resumed from
there: weights, moments, schedule, gradient scaler, random streams, the batch (with a loader that has a state, and with
one that has none), the best metric. Prints the first table of docs/how-to/integrations.md, to be pasted there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptman.integrations.streams import streams_now

SAVED, STEPS, WIDTH = 3, 5, 8
COLUMNS = ("weights", "moments", "schedule", "scaler", "streams", "batch", "best metric")


class WideMoments(torch.optim.Optimizer):
    """SGD whose momentum is float32 beside weights of fewer bits."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros(parameter.shape))
                momentum.mul_(0.9).add_(parameter.grad.float())
                parameter.sub_((group["lr"] * momentum).to(parameter.dtype))
        return loss


@dataclass
class Run:
    """The objects of one run, made from *seed*, and what its step after the save met."""

    seed: int
    place: Path
    loader_kind: type[DataLoader]
    seen: dict[str, object] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        self.model = nn.Linear(WIDTH, 1, dtype=torch.bfloat16)
        self.optimizer = WideMoments(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9)
        self.scaler = torch.amp.GradScaler("cpu")
        if not self.is_resumed:
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 7})
        rows = torch.arange(4 * STEPS * WIDTH).reshape(-1, WIDTH).to(torch.bfloat16) / 100
        self.rows = rows
        self.loader = self.loader_kind(TensorDataset(rows), batch_size=4, shuffle=True)

    @property
    def is_resumed(self) -> bool:
        return self.seed != 0

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        random.random(), np.random.rand()
        return (self.model(batch) * (1 + torch.rand(1))).square().mean()

    def meet(self, batch: torch.Tensor, best: object) -> None:
        """To be called as a step begins: keeps what it meets, if it is the first one after the save."""
        self.steps += 1
        if self.steps != (1 if self.is_resumed else SAVED + 1):
            return
        found = (
            self.model.state_dict(), [self.optimizer.state.get(one) for one in self.model.parameters()],
            self.schedule.state_dict(), self.scaler.state_dict(), streams_now(), batch, best,
        )  # fmt: skip
        self.seen = {name: frozen(value) for name, value in zip(COLUMNS, found, strict=True)}


def frozen(value: Any) -> Any:
    """A copy that can be compared with ``==``, types of tensors included."""
    if isinstance(value, torch.Tensor | np.ndarray):
        tensor = torch.as_tensor(value).detach().clone().contiguous()
        return str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes(), tensor.double().sum()
    if isinstance(value, dict):
        return {key: frozen(one) for key, one in value.items()}
    return [frozen(one) for one in value] if isinstance(value, list | tuple) else value


def accelerate(run: Run, with_ckptman: bool) -> None:
    """``save_state`` and ``load_state``, or a manager; what is best is registered."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from ckptman.integrations.accelerate import manager_for

    stateful = run.loader_kind is StatefulDataLoader
    loading = DataLoaderConfiguration(use_stateful_dataloader=stateful, use_seedable_sampler=True, data_seed=run.seed)
    accelerator = Accelerator(cpu=True, dataloader_config=loading)
    accelerator.scaler = run.scaler
    plain = DataLoader(TensorDataset(run.rows), batch_size=4, shuffle=True)
    model, optimizer, schedule, loader = accelerator.prepare(run.model, run.optimizer, run.schedule, plain)
    best = Best()
    accelerator.register_for_checkpointing(best)
    manager = manager_for(accelerator, run.place / "root") if with_ckptman else None
    if run.is_resumed and manager is not None:
        manager.restore()
    elif run.is_resumed:
        accelerator.load_state(str(run.place / "own"))
    for (batch,) in loader:
        run.meet(batch, best.metric)
        accelerator.backward(run.loss(batch) if model is run.model else model(batch).sum())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        best.metric = 0.5
        if run.steps == SAVED and not run.is_resumed:
            if manager is not None:
                manager.save(SAVED, block=True)
            else:
                accelerator.save_state(str(run.place / "own"))
    if manager is not None:
        manager.close()


class Best:
    """A metric as state of its own."""

    def __init__(self) -> None:
        self.metric = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"metric": self.metric}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.metric = state["metric"]


def ignite(run: Run, with_ckptman: bool) -> None:
    """``Checkpoint`` of everything that can be put into ``to_save``, with ``DiskSaver`` or ours."""
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    from ckptman.integrations.ignite import CkptmanSaver

    def train(engine: Engine, batch: list[torch.Tensor]) -> float:
        run.meet(batch[0], [score for score, _ in checkpoint._saved])
        run.optimizer.zero_grad()
        run.loss(batch[0]).backward()
        run.optimizer.step()
        run.schedule.step()
        return 0.5

    trainer = Engine(train)
    to_save = {
        "model": run.model, "optimizer": run.optimizer, "schedule": run.schedule, "scaler": run.scaler,
        "trainer": trainer,
    }  # fmt: skip
    if run.loader_kind is StatefulDataLoader:
        to_save["loader"] = run.loader
    own = DiskSaver(str(run.place / "own"), create_dir=True, require_empty=False)
    saver = CkptmanSaver(run.place / "root", to_save, trainer) if with_ckptman else own
    scored = {"score_name": "score", "score_function": lambda engine: engine.state.output, "include_self": True}
    checkpoint = Checkpoint(to_save, saver, n_saved=1, **scored)
    if not run.is_resumed:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=SAVED), checkpoint)
    elif with_ckptman:
        saver.restore()
        checkpoint.load_state_dict(saver.handler)
    else:
        (file,) = (run.place / "own").iterdir()
        Checkpoint.load_objects({**to_save, "checkpointer": checkpoint}, torch.load(file, weights_only=False))
    trainer.run(run.loader, max_epochs=1)
    if with_ckptman:
        saver.close()


def lightning(run: Run, with_ckptman: bool) -> None:
    """``ModelCheckpoint`` or ours, with the plugin for mixed precision that has the scaler."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins import Precision

    from ckptman.integrations.lightning import CkptmanCheckpoint, resume_path

    class Scaling(Precision):
        """Saves the scaler as ``MixedPrecision`` does, which itself wants a GPU."""

        def state_dict(self) -> dict[str, Any]:
            return dict(run.scaler.state_dict())

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            run.scaler.load_state_dict(state_dict)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = run.model

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            best = checkpoint.best_model_score
            run.meet(batch[0], None if best is None else float(best))
            self.log("score", 0.5)
            return run.loss(batch[0])

        def configure_optimizers(self) -> Any:
            return [run.optimizer], [{"scheduler": run.schedule, "interval": "step"}]

    kind, folder = (CkptmanCheckpoint, "root") if with_ckptman else (ModelCheckpoint, "own")
    folder = str(run.place / folder)
    checkpoint = kind(folder, monitor="score", save_top_k=1, every_n_train_steps=SAVED)
    found = None
    if run.is_resumed:
        found = resume_path(folder) if with_ckptman else str(next(Path(folder).iterdir()))
    Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[checkpoint], plugins=[Scaling()],
    ).fit(Module(), run.loader, ckpt_path=found, weights_only=None if with_ckptman else False)  # fmt: skip


def transformers(run: Run, with_ckptman: bool) -> None:
    """The Trainer, which makes its loader itself, and finds the best by evaluating."""
    from transformers import Trainer, TrainingArguments

    from ckptman.integrations.transformers import CkptmanTrainer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = run.model

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": run.loss(x)}

    class Meeting(CkptmanTrainer if with_ckptman else Trainer):  # type: ignore[misc]  # chosen as it runs
        def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *others: Any) -> torch.Tensor:
            run.meet(inputs["x"], self.state.best_metric)
            return super().training_step(model, inputs, *others)

    given = TrainingArguments(
        str(run.place / "own"), max_steps=STEPS, save_steps=SAVED, eval_strategy="steps", eval_steps=SAVED,
        load_best_model_at_end=True, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        logging_strategy="no", seed=run.seed, label_names=["x"],
    )  # fmt: skip
    rows = [{"x": row} for row in run.rows]
    root = {"root": str(run.place / "root")} if with_ckptman else {}
    optimizers = run.optimizer, run.schedule
    trainer = Meeting(Model(), given, train_dataset=rows, eval_dataset=rows[:4], optimizers=optimizers, **root)
    trainer.accelerator.scaler = run.scaler
    if with_ckptman:
        # a run that has ended goes on from where it was saved, not from its end
        trainer.train(resume_from_checkpoint=SAVED if run.is_resumed else None)
    else:
        own = str(run.place / "own" / f"checkpoint-{SAVED}")
        trainer.train(resume_from_checkpoint=own if run.is_resumed else None)


def plain(run: Run, with_ckptman: bool) -> None:
    """A loop of one's own, as within Ray Train: alone, it gets back what it saves itself."""
    from ckptman import CheckpointManager

    best = Best()
    state = {
        "model": run.model, "optimizer": run.optimizer, "schedule": run.schedule, "scaler": run.scaler, "best": best,
    }  # fmt: skip
    if run.loader_kind is StatefulDataLoader:
        state["loader"] = run.loader
    with CheckpointManager(run.place / "root", state) as manager:
        if run.is_resumed:
            manager.restore()
        for (batch,) in run.loader:
            run.meet(batch, best.metric)
            run.optimizer.zero_grad()
            run.loss(batch).backward()
            run.optimizer.step()
            run.schedule.step()
            best.metric = 0.5
            if run.steps == SAVED and not run.is_resumed:
                manager.save(SAVED, block=True)


Framework = Callable[[Run, bool], None]
ROWS: tuple[tuple[str, Framework, bool], ...] = (
    ("Hugging Face Trainer", transformers, False),
    ("Hugging Face Trainer with ckptman", transformers, True),
    ("Lightning", lightning, False),
    ("Lightning with ckptman", lightning, True),
    ("accelerate", accelerate, False),
    ("accelerate with ckptman", accelerate, True),
    ("ignite", ignite, False),
    ("ignite with ckptman", ignite, True),
    ("plain loop, Ray Train, with ckptman", plain, True),
)


def met(framework: Framework, with_ckptman: bool, loader_kind: type[DataLoader]) -> list[dict[str, Any]]:
    """What the step after the save met: without an interruption, and resumed."""
    with tempfile.TemporaryDirectory(prefix="restored-") as place:
        found = []
        for seed in (0, 1):
            run = Run(seed, Path(place), loader_kind)
            framework(run, with_ckptman)
            found.append(run.seen)
        return found


def verdict(name: str, before: Any, after: Any) -> str:
    """What is to be said of one column."""
    if before == after:
        return "exact"
    if name == "moments" and None not in after:
        dtypes = {one["momentum"][0].removeprefix("torch.") for one in after}
        return f"cast to {', '.join(sorted(dtypes))}" if dtypes != {"float32"} else "no"
    return "no"


def row(framework: Framework, with_ckptman: bool) -> dict[str, str]:
    """Column → verdict, for one row of the table."""
    before, after = met(framework, with_ckptman, StatefulDataLoader)
    found = {name: verdict(name, before[name], after[name]) for name in COLUMNS}
    before, after = met(framework, with_ckptman, DataLoader)
    found["batch"] = (
        f"stateful loader: {found['batch']}; any other: {verdict('batch', before['batch'], after['batch'])}"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restored")
    parser.add_argument("--only", default="", help="only the rows whose name begins so")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print("| | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    document = {}
    for name, framework, with_ckptman in ROWS:
        if name.startswith(given.only):
            document[name] = row(framework, with_ckptman)
            print(f"| {name} | " + " | ".join(document[name][column] for column in COLUMNS) + " |", flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
