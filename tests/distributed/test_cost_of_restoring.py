"""What a restore costs each of several ranks, counted: words exchanged, opens, bytes, threads."""

from __future__ import annotations

import os
import threading
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from fleet import run
from torch.distributed.fsdp import fully_shard

from ckptman import CheckpointManager
from ckptman.coordination.hub import Hub
from ckptman.storage.local import LocalStorage
from ckptman.storage.system import System

RANKS = 4
WIDTH = 3000  # a shard of a weight is a block of 8 MiB and a bit
ROUNDS = 4
"""Which checkpoint; does it fit, on all; is all read, on all; is all handed over, on all. Each protects the next."""


class Counting(System):
    """Counts what is asked for of the files of tensors."""

    def __init__(self) -> None:
        self.opens: Counter[str] = Counter()
        self.got_nbytes = 0
        self.largest_nbytes = 0
        self.threads: set[str] = set()

    def open_read(self, path: str) -> FileIO:
        if path.endswith(".safetensors"):
            self.opens[path] += 1
            self.threads.add(threading.current_thread().name)
        return super().open_read(path)

    def read_into(self, file: FileIO, start: int, into: memoryview) -> int:
        got = super().read_into(file, start, into)
        if str(file.name).endswith(".safetensors"):
            self.got_nbytes += got
            self.largest_nbytes = max(self.largest_nbytes, len(into))
        return got


def _state(value: float) -> dict[str, Any]:
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))
    for layer in model:
        fully_shard(layer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return {"model": model}


def _restore(rank: int, root: str) -> dict[str, Any]:
    with CheckpointManager(root, _state(rank + 1.0)) as manager:
        manager.save(1, block=True)
    counting, calls = Counting(), Counter[str]()
    for name in ("gather", "broadcast"):
        _count(calls, name)
    os.cpu_count = lambda: 2  # type: ignore[method-assign,assignment]  # this process measures two cores on any machine
    with CheckpointManager(LocalStorage(root, system=counting), state := _state(0.0)) as manager:
        calls.clear()
        manager.restore(1)
        found = dict(calls)
    held = [parameter.to_local() for parameter in state["model"].parameters()]
    return {
        "calls": found,
        "is_restored": all(bool((one == rank + 1).all()) for one in held),
        "held_nbytes": sum(one.nbytes for one in held),
        "got_nbytes": counting.got_nbytes,
        "largest_nbytes": counting.largest_nbytes,
        "opens": dict(counting.opens),
        "threads": sorted(counting.threads),
    }


def _count(calls: Counter[str], name: str) -> None:
    method = getattr(Hub, name)

    def counted(self: Hub, value: Any) -> Any:
        calls[name] += 1
        return method(self, value)

    setattr(Hub, name, counted)


def test_a_restore_takes_four_rounds_and_each_rank_its_own_bytes_on_one_thread(tmp_path: Path) -> None:
    """Four ranks on two cores: the fifth thread of a host would only take the disk from the others."""
    for one in run(tmp_path, RANKS, _restore, str(tmp_path / "root")):
        assert one["is_restored"]
        assert one["calls"] == {"gather": ROUNDS, "broadcast": ROUNDS}
        assert one["held_nbytes"] <= one["got_nbytes"] < one["held_nbytes"] + (64 << 10)
        assert one["largest_nbytes"] == 1 << 20
        assert not [name for name in one["threads"] if name.startswith("ckptman-read")]
        # each file once for its size, once for its header; each of two tensors in two pieces; random streams in one
        assert sum(one["opens"].values()) == 2 * len(one["opens"]) + 2 * 2 + 1
        assert len(one["opens"]) == 2
