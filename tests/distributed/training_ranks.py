"""Under torchrun: trains until it is told to stop. ``training_ranks.py ROOT OUT``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ckptman import CheckpointManager, Every, Preempted

root, out = Path(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
weights = torch.zeros(4)
with CheckpointManager(root, {"weights": weights}, save_every=Every(steps=10)) as manager:
    found = manager.restore()
    begin = found.step if found else 0
    for step in range(begin + 1, 100_000):
        weights += 1
        dist.all_reduce(weights, op=dist.ReduceOp.MAX)
        time.sleep(0.005)
        try:
            manager.maybe_save(step)
        except Preempted as error:
            (out / f"end-{rank}").write_text(json.dumps({"step": step, "code": error.code, "text": str(error)}))
            raise
        if step == 5:
            (out / f"begun-{rank}").touch()
