"""Under torchrun: trains until it is told to stop. ``training_ranks.py ROOT OUT``; rank 1 is killed once."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ckptman import CheckpointManager, Every, Preempted

root, out = Path(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo")
rank, is_again = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
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
            if is_again:  # the agent stops the others of a killed rank by SIGTERM too
                (out / f"end-{rank}").write_text(json.dumps({"step": step, "code": error.code, "text": str(error)}))
            raise
        if is_again and step == begin + 5:
            assert weights[0].item() == step
            (out / f"again-{rank}").write_text(str(begin))
        if not is_again and step == 30:
            manager.wait()
            dist.barrier()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
