"""
What a save costs inside a framework: its own beside ckptman's.

    python -m benchmarks.guests [--width 2048] [--repetitions 5] [--out guests.json]

One model (three square layers and AdamW moments) under the Hugging Face Trainer, Lightning, accelerate, ignite and Ray
Train (a cluster of one worker on this machine). Each repetition saves once in either way, in turn, after a training
step (the Hugging Face Trainer: one run after the other), and measures how long training waits (stall), how long until
the save is done (time: for ckptman durable and committed, for the frameworks, which do not fsync, handed to the page
cache), and the bytes that lie on the disk. Prints medians; ``--out`` gets all samples as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

Save = Callable[[int], tuple[float, float]]
"""Saves as a step: seconds of stall, and until it is done."""


def model_of(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))


def timed(save: Callable[[], object], finish: Callable[[], object]) -> tuple[float, float]:
    began = time.perf_counter()
    save()
    stall = time.perf_counter() - began
    finish()
    return stall, time.perf_counter() - began


def lightning(width: int, place: Path) -> dict[str, tuple[Callable[[], None], Save]]:
    """Through ``ModelCheckpoint._save_checkpoint``, as in mid-training."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ckptman.integrations.lightning import CkptmanCheckpoint

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model_of(width)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    def contestant(saving: ModelCheckpoint) -> tuple[Callable[[], None], Save]:
        model = Model()
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=1,
            callbacks=[saving],
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(torch.randn(2, width), batch_size=2))
        optimizer = trainer.optimizers[0]

        def step() -> None:
            model.net(torch.randn(2, width)).square().mean().backward()
            optimizer.step()

        def save(number: int) -> tuple[float, float]:
            trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = number
            path = str(Path(saving.dirpath) / f"step-{number}.ckpt")
            finish = saving._plugin.wait if isinstance(saving, CkptmanCheckpoint) else lambda: None
            return timed(lambda: saving._save_checkpoint(trainer, path), finish)

        return step, save

    return {
        "Lightning": contestant(ModelCheckpoint(str(place / "own"), save_top_k=0)),
        "Lightning with ckptman": contestant(CkptmanCheckpoint(str(place / "ckptman"), save_top_k=0)),
    }


def accelerate(width: int, place: Path) -> dict[str, tuple[Callable[[], None], Save]]:
    """Through ``save_state``, and through the manager."""
    from accelerate import Accelerator

    from ckptman.integrations.accelerate import manager_for

    accelerator = Accelerator(cpu=True)
    model = model_of(width)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    manager = manager_for(accelerator, place / "ckptman")

    def step() -> None:
        accelerator.backward(model(torch.randn(2, width)).square().mean())
        optimizer.step()

    return {
        "accelerate": (
            step,
            lambda n: timed(lambda: accelerator.save_state(str(place / "own" / str(n))), lambda: None),
        ),
        "accelerate with ckptman": (step, lambda n: timed(lambda: manager.save(n), manager.wait)),
    }


def ignite(width: int, place: Path) -> dict[str, tuple[Callable[[], None], Save]]:
    """Through ``Checkpoint``, with ``DiskSaver`` and with ours."""
    from ignite.engine import Engine
    from ignite.handlers import Checkpoint, DiskSaver

    from ckptman.integrations.ignite import CkptmanSaver

    model = model_of(width)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Engine(lambda engine, batch: None)
    trainer.run([0], max_epochs=1)
    to_save = {"model": model, "optimizer": optimizer}
    saver = CkptmanSaver(place / "ckptman", to_save, trainer)
    scored = {"n_saved": None, "score_name": "n", "score_function": lambda engine: engine.state.iteration}
    own = Checkpoint(to_save, DiskSaver(str(place / "own"), create_dir=True), **scored)
    ours = Checkpoint(to_save, saver, **scored)

    def step() -> None:
        model(torch.randn(2, width)).square().mean().backward()
        optimizer.step()

    def save(checkpoint: Checkpoint, finish: Callable[[], object]) -> Save:
        def once(number: int) -> tuple[float, float]:
            trainer.state.iteration = number
            return timed(lambda: checkpoint(trainer), finish)

        return once

    return {"ignite": (step, save(own, lambda: None)), "ignite with ckptman": (step, save(ours, saver._manager.wait))}


Figures = dict[str, list[tuple[float, float]]]


def transformers(width: int, place: Path, repetitions: int) -> Figures:
    """Through ``Trainer._save_checkpoint``, called by ``train`` after every step; one run after the other."""
    from transformers import Trainer, TrainingArguments

    from ckptman.integrations.transformers import CkptmanTrainer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model_of(width)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.net(x).square().mean()}

    def figures(kind: type[Trainer], **options: object) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []

        class Timed(kind):
            def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
                session = getattr(self, "_ckptman_session", None)
                finish = (lambda: None) if session is None else session._manager.wait
                found.append(timed(lambda: super(Timed, self)._save_checkpoint(*args, **kwargs), finish))

        given = TrainingArguments(
            output_dir=str(place / "own"), max_steps=repetitions + 1, save_steps=1, per_device_train_batch_size=2,
            use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        data = [{"x": row} for row in torch.randn(2 * repetitions + 2, width)]
        Timed(Model(), given, train_dataset=data, **options).train()
        return found

    own, ours = figures(Trainer), figures(CkptmanTrainer, root=str(place / "ckptman"))
    return {"Hugging Face Trainer": own, "Hugging Face Trainer with ckptman": ours}


def ray(width: int, place: Path, repetitions: int) -> Figures:
    """Through ``ray.train.report``, of a directory with a file of ``torch.save``, and of a pointer."""
    import ray as cluster
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    cluster.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    try:
        TorchTrainer(
            _ray_worker,
            train_loop_config={"width": width, "place": str(place), "repetitions": repetitions},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="own", storage_path=str(place)),
        ).fit()
    finally:
        cluster.shutdown()
    return json.loads((place / "figures.json").read_text(encoding="utf-8"))


def _ray_worker(config: Mapping[str, Any]) -> None:
    from ray import train

    from ckptman import CheckpointManager
    from ckptman.integrations.ray import report

    place = Path(config["place"])
    model = model_of(config["width"])
    optimizer = torch.optim.AdamW(model.parameters())

    def own(number: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": number}
            torch.save(state, Path(folder) / "state.pt")
            train.report({}, checkpoint=train.Checkpoint.from_directory(folder))

    with CheckpointManager(place / "ckptman", {"model": model, "optimizer": optimizer}) as manager:
        saves = {"Ray Train": own, "Ray Train with ckptman": lambda number: report(manager, manager.save(number), {})}
        figures: Figures = {name: [] for name in saves}
        for number in range(2, 3 + config["repetitions"]):
            for name, save in saves.items():
                model(torch.randn(2, config["width"])).square().mean().backward()
                optimizer.step()
                figures[name].append(timed(partial(save, number), lambda: None))
    (place / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def in_turn(
    framework: Callable[..., dict[str, tuple[Callable[[], None], Save]]],
) -> Callable[[int, Path, int], Figures]:
    """Measures the contestants of *framework* one after the other in each repetition."""

    def measure(width: int, place: Path, repetitions: int) -> Figures:
        contestants = framework(width, place)
        figures: Figures = {name: [] for name in contestants}
        for number in range(2, 3 + repetitions):
            for name, (step, save) in contestants.items():
                step()
                figures[name].append(save(number))
        return figures

    return measure


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guests")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"| save of {given.width**2 * 3 * 12 / 2**20:.0f} MiB by | stall | time | bytes |\n|---|---|---|---|")
    document: dict[str, object] = {}
    for measure in (transformers, in_turn(lightning), in_turn(accelerate), in_turn(ignite), ray):
        place = Path(tempfile.mkdtemp(prefix="guests-"))
        for name, measured in measure(given.width, place, given.repetitions).items():
            stall, done = (statistics.median(values) for values in zip(*measured[1:], strict=True))
            folder = place / ("ckptman" if "ckptman" in name else "own")
            nbytes = size_of(folder) / len(measured)
            print(f"| {name} | {stall:.3f} s | {done:.3f} s | {nbytes / 2**20:.1f} MiB |", flush=True)
            samples = [{"stall_s": one, "time_s": other} for one, other in measured[1:]]
            document[name] = {"stall_s": stall, "time_s": done, "nbytes": nbytes, "samples": samples}
        shutil.rmtree(place)
    if given.out is not None:
        given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
