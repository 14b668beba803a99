"""Ranks of one machine: forked processes with one gloo group, that measure from a barrier to a barrier."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 4


def in_ranks(work: Callable[..., Any], *args: object) -> list[Any]:
    """
    What ``work(rank, *args)`` gives (JSON), by rank, in processes of their own.

    They find each other as those of torchrun do, through a TCP store, which here lives in rank 0.

    Raises:
        SystemExit: One of them failed.
    """
    with tempfile.TemporaryDirectory(prefix="ckptman-ranks-") as results, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
        found.close()
        pids = [_fork(Path(results), port, rank, work, args) for rank in range(RANKS)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(statuses):
            raise SystemExit(f"ranks ended with {statuses}")
        return [json.loads((Path(results) / str(rank)).read_text()) for rank in range(RANKS)]


def _fork(results: Path, port: int, rank: int, work: Callable[..., Any], args: tuple[object, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(rank)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
        (results / str(rank)).write_text(json.dumps(work(rank, *args)))
        dist.barrier()  # the store goes with rank 0
        status = 0
    except BaseException:  # noqa: BLE001 - a process's edge
        traceback.print_exc()
    finally:
        os._exit(status)


def timed(work: Callable[[], object]) -> float:
    """Seconds until the slowest rank is done. Collective."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def on_rank_0(rank: int, work: Callable[[], object]) -> None:
    """Have rank 0 do *work*, and all wait for it. Collective."""
    if rank == 0:
        work()
    dist.barrier()
