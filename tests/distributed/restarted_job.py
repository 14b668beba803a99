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
from sharded_models import facts, state_of, step
from test_killed_ranks import Deadly

from ckptman import CheckpointManager

STEPS = 6


def main(root: str, out: Path) -> None:
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    storage, state = Deadly(root), state_of("fsdp")
    ended_at = 0.0
    try:
        with CheckpointManager(storage, state) as manager:
            found = manager.restore()
            begun = found.step if found else 0
            try:
                for number in range(begun, STEPS):
                    step(state, "fsdp", number)
                    if (life, rank, number) == (0, 1, 2):
                        storage.moment = "writing"
                    manager.save(number + 1)
            finally:
                ended_at = time.monotonic()
    finally:
        said = {"begun": begun, "left after": time.monotonic() - ended_at}
        (out / f"life-{life}-{rank}").write_text(json.dumps(said))
    uninterrupted = state_of("fsdp")
    for number in range(STEPS):
        step(uninterrupted, "fsdp", number)
    (out / f"end-{rank}").write_text(json.dumps(facts(state) == facts(uninterrupted)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
