"""Real ranks for tests: forked processes that share a gloo group, as torchrun's do, without its seconds of start."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

TIMEOUT_S = 100

torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # imports half of torch: once here, and not in each process


def run(
    folder: Path, world_size: int, scenario: Callable[..., Any], *args: object, group: bool = True, tcp: bool = False
) -> list[Any]:
    """
    Run ``scenario(rank, *args)`` in *world_size* processes; return what each gave (JSON), None where it was killed.

    Their group has a store of files, or with *tcp* one that lives in rank 0, as without torchrun.

    Raises:
        AssertionError: One raised; the text has its traceback. Or they were not done in time.
    """
    store = folder / f"store-{time.monotonic_ns()}"
    method = (f"tcp://127.0.0.1:{free_port()}" if tcp else f"file://{store}") if group else None
    children = [_fork(folder, store, rank, world_size, scenario, args, method) for rank in range(world_size)]
    ends_at = time.monotonic() + TIMEOUT_S
    statuses = [_wait(pid, ends_at) for pid, _ in children]
    failures = [_text(path) for (_, path), status in zip(children, statuses, strict=True) if status not in (0, -9)]
    assert not failures, f"statuses {statuses}:\n" + "\n".join(failures)
    return [
        json.loads(path.read_text()) if status == 0 else None
        for (_, path), status in zip(children, statuses, strict=True)
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else "(nothing)"


def _fork(
    folder: Path,
    store: Path,
    rank: int,
    world_size: int,
    scenario: Callable[..., Any],
    args: tuple[object, ...],
    init_method: str | None,
) -> tuple[int, Path]:
    path = folder / f"{store.name}-{rank}.json"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid, path
    status = 1
    try:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        if init_method is not None:
            dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
        path.write_text(json.dumps(scenario(rank, *args)))
        status = 0
    except BaseException:  # noqa: BLE001 - a process's edge
        path.write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        os._exit(status)


def _wait(pid: int, ends_at: float) -> int:
    while time.monotonic() < ends_at:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1
