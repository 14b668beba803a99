"""
Train with Ray Train. A worker that dies is started again by Ray, and goes on; so does the same command, run again.

    python docs/examples/ray_run.py /shared/runs/ray
"""

import argparse
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn


def train_loop(config: dict[str, object]) -> None:
    """What every worker runs."""
    from ckptman import CheckpointManager, Every, keep
    from ckptman.integrations.ray import report, restore

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses: list[float] = []
    state = {"model": model, "optimizer": optimizer, "losses": losses}
    with CheckpointManager(config["root"], state, save_every=Every(steps=4), keep=keep.last(3)) as manager:
        found = restore(manager)
        for step in range(found.step if found else 0, 20):
            inputs = torch.randn(8, 16)
            loss = nn.functional.mse_loss(model(inputs), inputs.sum(dim=1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            saved = manager.maybe_save(step + 1, metrics={"loss": loss.item()})
            report(manager, saved, {"loss": loss.item(), "step": step + 1})
            if found is None and step + 1 == config.get("die_at"):
                os.kill(os.getpid(), signal.SIGKILL)


def run(root: str, storage: str, die_at: int | None = None) -> object:
    """One run of Ray Train, which may lose its worker once."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        train_loop,
        train_loop_config={"root": str(Path(root).absolute()), "die_at": die_at},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="example", storage_path=storage, failure_config=FailureConfig(max_failures=1)),
    ).fit()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", help="an absolute path or a URL that every worker sees")
    parser.add_argument("--storage", default="/tmp/ray-results", help="where Ray keeps its own files")
    given = parser.parse_args()
    print(run(given.root, given.storage).metrics)


if __name__ == "__main__":
    main()
