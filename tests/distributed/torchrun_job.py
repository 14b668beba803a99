"""What test_torchrun.py starts with torchrun: trains, saves, and restores into a model that is spread otherwise."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from sharded_models import facts, state_of, step

from ckptman import CheckpointManager
from ckptman.events import Event, Staged


def main(root: str) -> None:
    dist.init_process_group("gloo")
    staged: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, Staged):
            staged.append(event.nbytes)

    state = state_of("fsdp")
    with CheckpointManager(root, state, hooks=[watch]) as manager:
        for number in range(3):
            step(state, "fsdp", number)
            manager.save(number + 1)
        manager.wait()
        before = facts(state)
    other = state_of("ddp")
    with CheckpointManager(root, other) as manager:
        found = manager.restore()
        assert found is not None
        after = facts(other)
    with open(f"{root}/found-{dist.get_rank()}.json", "w") as file:
        json.dump({"step": found.step, "equal": before == after, "staged": staged, "nbytes": found.nbytes}, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
