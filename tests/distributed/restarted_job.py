"""
What test_torchrun.py lets torchrun start twice: in the first life rank 1 is killed in the middle of the third save.

``restarted_job.py ROOT OUT``
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deadly_storage import Deadly

from ckptman import CheckpointManager, Every
from ckptman.coordinator import TorchCoordinator

STEPS = 6


def step(weights: torch.Tensor, number: int) -> None:
    """Depends on every rank's part of the data and on all steps before, so a lost or doubled one shows."""
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(100 * number + dist.get_rank()))
    dist.all_reduce(gradient)
    weights.mul_(0.9).add_(gradient)


def main(root: str, out: Path) -> None:
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank, weights, storage = dist.get_rank(), torch.zeros(1000), Deadly(root)
    begun, ended_at = -1, 0.0
    ranks = TorchCoordinator(silence_s=5.0)
    try:
        with CheckpointManager(storage, {"weights": weights}, save_every=Every(steps=1), coordinator=ranks) as manager:
            found = manager.restore()
            begun = found.step if found else 0
            try:
                for number in range(begun, STEPS):
                    step(weights, number)
                    if (life, rank, number) == (0, 1, 2):
                        storage.moment = "writing"
                    manager.maybe_save(number + 1)  # hears SIGTERM, which the survivor gets too
            finally:
                ended_at = time.monotonic()
    finally:
        said = {"begun": begun, "left after": time.monotonic() - ended_at}
        (out / f"life-{life}-{rank}").write_text(json.dumps(said))
    uninterrupted = torch.zeros(1000)
    for number in range(STEPS):
        step(uninterrupted, number)
    (out / f"end-{rank}").write_text(json.dumps(torch.equal(weights, uninterrupted)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
