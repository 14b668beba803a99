"""One rank of a job without torchrun that never closes its manager. ``leaving_job.py ROOT``."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from ckptman import CheckpointManager
from ckptman.coordination.hub import Hub

dist.init_process_group("gloo")
if dist.get_rank() == 1:
    wait_for = Hub._wait_for

    def wait_slowly(hub: Hub, keys: dict[int, str]) -> None:
        time.sleep(0.5)  # rank 0 has said it long ago
        wait_for(hub, keys)

    Hub._wait_for = wait_slowly  # type: ignore[method-assign]
manager = CheckpointManager(sys.argv[1], {"w": torch.ones(4)})
assert manager.save(1, block=True).step == 1
