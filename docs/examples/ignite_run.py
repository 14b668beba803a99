"""
Train with ignite; kill it, run the same command again, and it goes on.

    python docs/examples/ignite_run.py runs/ignite
"""

import argparse

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from ignite.utils import manual_seed
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptman.integrations.ignite import CkptmanSaver


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    manual_seed(0)
    inputs = torch.randn(80, 16)
    loader = StatefulDataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    losses: dict[str, list[float]] = {"losses": []}

    def train_step(engine: Engine, batch: list[torch.Tensor]) -> float:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses["losses"].append(loss.item())
        return loss.item()

    trainer = Engine(train_step)
    to_save = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "trainer": trainer}
    with CkptmanSaver(given.root, {**to_save, "losses": losses}, trainer) as saver:
        checkpoint = Checkpoint(to_save, saver, n_saved=2, include_self=True)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), checkpoint)
        if saver.restore():
            checkpoint.load_state_dict(saver.handler)
        if trainer.state.epoch < given.epochs:
            trainer.run(loader, max_epochs=given.epochs)
    print(f"finished step {trainer.state.iteration}, loss {losses['losses'][-1]:.4f}")


if __name__ == "__main__":
    main()
