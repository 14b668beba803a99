"""
Train with Lightning; kill it, run the same command again, and it goes on.

    python docs/examples/lightning_run.py runs/lightning
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptman.integrations.lightning import CkptmanCheckpoint


class Regression(LightningModule):
    """A small network with dropout, so that every step draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs), targets)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        inputs, targets = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(inputs), targets))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        checkpoint["losses"] = list(self.losses)

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        self.losses = list(checkpoint["losses"])


def data(seed: int) -> TensorDataset:
    inputs = torch.randn(80, 16, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    model = Regression()
    checkpoint = CkptmanCheckpoint(given.root, monitor="loss", save_top_k=2, save_last=True, every_n_train_steps=3)
    trainer = Trainer(
        max_epochs=given.epochs,
        accelerator="cpu",
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = StatefulDataLoader(data(1), batch_size=8, shuffle=True)
    trainer.fit(model, loader, StatefulDataLoader(data(2), batch_size=40), ckpt_path="last")
    print(f"finished step {trainer.global_step}, loss {model.losses[-1]:.4f}")


if __name__ == "__main__":
    main()
