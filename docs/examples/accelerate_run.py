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
        self.step = 0
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, object]:
        return {"epoch": self.epoch, "step": self.step, "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.epoch, self.step, self.losses = state["epoch"], state["step"], list(state["losses"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    loading = DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True, data_seed=0)
    accelerator = Accelerator(cpu=True, dataloader_config=loading, gradient_accumulation_steps=2)
    set_seed(0, device_specific=True)  # each rank draws dropout of its own
    inputs = torch.randn(80, 16, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)

    with manager_for(accelerator, given.root, save_every=Every(steps=2), keep=keep.last(3)) as manager:
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
                if accelerator.sync_gradients:  # an optimizer step was made, and no gradients wait for the next one
                    progress.step += 1
                    manager.maybe_save(progress.step, metrics={"loss": loss.item()})
    accelerator.wait_for_everyone()  # rank 0 may keep what the others talk through: it leaves last
    print(f"finished step {progress.step}, loss {progress.losses[-1]:.4f}")


if __name__ == "__main__":
    main()
