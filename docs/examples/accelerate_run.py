"""
Train with accelerate; kill it, run the same command again, and it goes on.

    python docs/examples/accelerate_run.py runs/accelerate
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptman import Every, keep
from ckptman.integrations.accelerate import manager_for


class Progress:
    """What the script itself has to remember."""

    def __init__(self) -> None:
        self.epoch = 0
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, object]:
        return {"epoch": self.epoch, "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.epoch, self.losses = state["epoch"], list(state["losses"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    loading = DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=loading, gradient_accumulation_steps=2)
    inputs = torch.randn(80, 16)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)

    with manager_for(accelerator, given.root, save_every=Every(steps=4), keep=keep.last(3)) as manager:
        manager.restore()
        while progress.epoch < given.epochs:
            for batch, targets in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.mse_loss(model(batch), targets)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                progress.losses.append(loss.item())
                progress.epoch += loader.end_of_dataloader
                manager.maybe_save(len(progress.losses), metrics={"loss": loss.item()})
    print(f"finished step {len(progress.losses)}, loss {progress.losses[-1]:.4f}")


if __name__ == "__main__":
    main()
