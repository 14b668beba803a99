"""Two ranks of Lightning: FSDP2, tensor parallel, or a strategy with files of its own; a program for forking.py."""

import os
import runpy
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
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


class OwnFiles(DDPStrategy):
    """Writes a folder with a file of each rank, as DeepSpeed does, and loads everything itself."""

    def save_checkpoint(self, checkpoint: dict, filepath: Path, storage_options: object = None) -> None:
        Path(filepath).mkdir(parents=True, exist_ok=True)
        trained = {key: checkpoint.pop(key) for key in ("state_dict", "optimizer_states", "losses")}
        torch.save(trained, Path(filepath) / f"rank-{self.global_rank}.pt")
        if self.is_global_zero:
            torch.save(checkpoint, Path(filepath) / "rest.pt")

    def load_checkpoint(self, checkpoint_path: Path, weights_only: bool | None = None) -> dict:
        rest = torch.load(Path(checkpoint_path) / "rest.pt", weights_only=False)
        return {**rest, **torch.load(Path(checkpoint_path) / f"rank-{self.global_rank}.pt", weights_only=False)}


STRATEGIES = {
    "fsdp": lambda: ModelParallelStrategy(2, 1),
    "tensor_parallel": lambda: ModelParallelStrategy(1, 2),
    "own_files": OwnFiles,
}


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    spread = root.parent.name
    seed_everything(0, verbose=False)
    model = EXAMPLE["Regression"]() if spread == "own_files" else Sharded()
    if spread != "tensor_parallel":
        seed_everything(1 + int(os.environ["RANK"]), verbose=False)  # each rank draws dropout of its own
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[spread](),
        default_root_dir=root.parent / f"{root.name}-own",
        callbacks=[CkptmanCheckpoint(root, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(EXAMPLE["data"](1), batch_size=8, shuffle=True)
    trainer.fit(model, loader, DataLoader(EXAMPLE["data"](2), batch_size=40), ckpt_path="last")


if __name__ == "__main__":
    main()
