"""One rank of a job without torchrun: nobody closes anything, and rank 0 ends long before the others have heard it."""

from __future__ import annotations

import time

import torch.distributed as dist

from ckptman.coordinator import TorchCoordinator

dist.init_process_group("gloo")
ranks = TorchCoordinator()
ranks.agree(b"all here")
if dist.get_rank():
    time.sleep(2.0)
assert ranks.broadcast(None if dist.get_rank() else b"the last word") == b"the last word"
