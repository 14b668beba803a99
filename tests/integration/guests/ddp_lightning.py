"""
Two ranks of Lightning's DDP; a program for test_ddp.py.

    python -m torch.distributed.run --nproc-per-node 2 ddp_lightning.py ROOT EPOCHS DIE_AT
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from ckptman.integrations.lightning import CkptmanCheckpoint

EXAMPLE = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "examples" / "lightning_run.py"), run_name="example")


class Die(Callback):
    """Both ranks die at a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    root, epochs, die_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    model = EXAMPLE["Regression"]()
    seed_everything(1 + int(os.environ["RANK"]), verbose=False)  # each rank draws dropout of its own
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[CkptmanCheckpoint(root, save_last=True), Die(die_at)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(EXAMPLE["data"](1), batch_size=8, shuffle=True)
    trainer.fit(model, loader, DataLoader(EXAMPLE["data"](2), batch_size=40), ckpt_path="last")


if __name__ == "__main__":
    main()
