"""Two ranks of Lightning's DDP with an ordinary loader; a program for forking.py."""

import os
import runpy
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from ckptman.integrations.lightning import CkptmanCheckpoint

EXAMPLE = runpy.run_path(str(Path("docs/examples/lightning_run.py").absolute()), run_name="example")


def main() -> None:
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    model = EXAMPLE["Regression"]()
    seed_everything(1 + int(os.environ["RANK"]), verbose=False)  # each rank draws dropout of its own
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[CkptmanCheckpoint(sys.argv[1], save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(EXAMPLE["data"](1), batch_size=8, shuffle=True)
    trainer.fit(model, loader, DataLoader(EXAMPLE["data"](2), batch_size=40), ckpt_path="last")


if __name__ == "__main__":
    main()
