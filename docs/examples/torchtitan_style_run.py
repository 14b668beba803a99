"""
A loop in the style of torchtitan: model parts, optimizers and schedules in lists, a trainer with its own state.

    python docs/examples/torchtitan_style_run.py runs/titan
"""

import argparse
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptman import CheckpointManager, Every, keep

STEPS = 40


class TrainState:
    """What torchtitan's trainer keeps of itself: steps, tokens, logged losses."""

    def __init__(self) -> None:
        self.step = 0
        self.tokens_seen = 0
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, object]:
        return {"step": self.step, "tokens_seen": self.tokens_seen, "losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.step, self.tokens_seen, self.losses = state["step"], state["tokens_seen"], list(state["losses"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    given = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    inputs = torch.randn(80, 16)
    loader = StatefulDataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=8, shuffle=True)
    model_parts = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2)), nn.Linear(32, 1)]
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in model_parts]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, T_max=STEPS) for one in optimizers]
    train_state = TrainState()

    state = {
        **{f"model-{index}": part for index, part in enumerate(model_parts)},
        **{f"optimizer-{index}": one for index, one in enumerate(optimizers)},
        **{f"schedule-{index}": one for index, one in enumerate(schedules)},
        "loader": loader,
        "train_state": train_state,
    }
    with CheckpointManager(given.root, state, save_every=Every(steps=4), keep=keep.last(3)) as manager:
        manager.restore()
        batches = iter(loader)
        while train_state.step < STEPS:
            try:
                batch, targets = next(batches)
            except StopIteration:
                batches = iter(loader)
                continue
            for optimizer in optimizers:
                optimizer.zero_grad()
            for part in model_parts:
                batch = part(batch)
            loss = nn.functional.mse_loss(batch, targets)
            loss.backward()
            for one in (*optimizers, *schedules):
                one.step()
            train_state.step += 1
            train_state.tokens_seen += len(targets)
            train_state.losses.append(loss.item())
            manager.maybe_save(train_state.step, metrics={"loss": loss.item()})
    print(f"finished step {train_state.step}, loss {train_state.losses[-1]:.4f}")


if __name__ == "__main__":
    main()
