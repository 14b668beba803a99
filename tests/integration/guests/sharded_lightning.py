"""Two ranks of Lightning's ModelParallelStrategy, FSDP2 or tensor parallel; a program for forking.py."""

import os
import runpy
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from ckptman.integrations.lightning import CkptmanCheckpoint

EXAMPLE = runpy.run_path(str(Path("docs/examples/lightning_run.py").absolute()), run_name="example")


class Sharded(EXAMPLE["Regression"]):
    """The model of the example; layers 0 and 3 are linear."""

    def configure_model(self) -> None:
        if self.device_mesh["tensor_parallel"].size() > 1:
            plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        else:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    spread = "tensor" if root.parent.name == "tensor_parallel" else "fsdp"
    seed_everything(0, verbose=False)
    model = Sharded()
    if spread == "fsdp":
        seed_everything(1 + int(os.environ["RANK"]), verbose=False)  # each rank draws dropout of its own
    sizes = (2, 1) if spread == "fsdp" else (1, 2)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(*sizes),
        callbacks=[CkptmanCheckpoint(root, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(EXAMPLE["data"](1), batch_size=8, shuffle=True)
    trainer.fit(model, loader, DataLoader(EXAMPLE["data"](2), batch_size=40), ckpt_path="last")


if __name__ == "__main__":
    main()
