"""
Four ranks on one machine: time to durable and to restored, beside plain files of the same bytes and beside torch DCP.

    python -m benchmarks.ranks [--mib 400] [--repeats 5]

Contestants take turns in random order within a repetition; a time is that of the slowest rank, from a barrier to a
barrier. The page cache is warm for reads. Ratios are medians of those within one repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from ckptman import CheckpointManager

RANKS = 4
CHUNK = 16 << 20
LAYERS = 4


def build(mib: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model whose parameters and two moments have about *mib* MiB, after one step."""
    width = int((mib * (1 << 20) / 12 / LAYERS) ** 0.5)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(LAYERS)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def local_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[memoryview]:
    tensors = [parameter.to_local().detach() for parameter in model.parameters()]
    for state in optimizer.state.values():
        tensors += [value.to_local() for value in state.values() if hasattr(value, "to_local")]
    return [memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()) for tensor in tensors]


def write_plain(path: Path, parts: list[memoryview]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for part in parts:
        for start in range(0, len(part), CHUNK):
            os.write(file, part[start : start + CHUNK])
    os.fsync(file)
    os.close(file)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def read_plain(path: Path, parts: list[memoryview]) -> None:
    with path.open("rb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), CHUNK):
                file.readinto(part[start : start + CHUNK])


def timed(work: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def compete(rank: int, folder: Path, mib: int, repeats: int) -> dict[str, Any]:
    model, optimizer = build(mib)
    parts = local_bytes(model, optimizer)
    times: dict[str, list[float]] = {}
    dice = random.Random(0)
    manager = CheckpointManager(folder / "ckptman", {"model": model, "optimizer": optimizer})

    def dcp_save(number: int) -> None:
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"dcp-{number}")

    def dcp_load(number: int) -> None:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"dcp-{number}")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)

    saves = {
        "plain": lambda number: write_plain(folder / f"plain-{number}" / str(rank), parts),
        "ckptman": lambda number: manager.save(number, block=True),
        "dcp": dcp_save,
    }
    loads = {
        "plain": lambda number: read_plain(folder / f"plain-{number}" / str(rank), parts),
        "ckptman": manager.restore,
        "dcp": dcp_load,
    }
    for number in range(repeats + 1):
        for kind, contestants in (("save", saves), ("restore", loads)):
            names = sorted(contestants)
            dice.shuffle(names)
            for name in names:
                work = contestants[name]
                if rank == 0:
                    os.sync()
                seconds = timed(lambda work=work, number=number: work(number))
                if number:  # the first one warms up
                    times.setdefault(f"{kind} {name}", []).append(seconds)
        manager.delete(number)
        for name in ("plain", "dcp"):
            if rank == 0:
                shutil.rmtree(folder / f"{name}-{number}")
    manager.close()
    with CheckpointManager(folder / "empty", {"progress": {"epoch": 1}}) as empty:
        times["empty save"] = [timed(lambda step=step: empty.save(step, block=True)) for step in range(21)][1:]
    return {"nbytes": sum(map(len, parts)), "times": times}


def fork(folder: Path, store: Path, rank: int, mib: int, repeats: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(rank)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        result = compete(rank, folder, mib, repeats)
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ckptman-ranks-", dir=chosen.folder))
    try:
        pids = [fork(folder, folder / "store", rank, chosen.mib, chosen.repeats) for rank in range(RANKS)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(statuses):
            raise SystemExit(f"ranks ended with {statuses}")
        report(json.loads((folder / "result.json").read_text()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(result: dict[str, Any]) -> None:
    times = result["times"]
    print(f"{RANKS} ranks, {result['nbytes'] * RANKS / 2**20:.0f} MiB in all")
    for name, seconds in times.items():
        print(f"{name:18} {statistics.median(seconds):7.3f} s   ({min(seconds):.3f} to {max(seconds):.3f})")
    for kind in ("save", "restore"):
        for other in ("plain", "dcp"):
            pairs = zip(times[f"{kind} ckptman"], times[f"{kind} {other}"], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            print(f"{kind}: ckptman takes {ratio:.2f} x the time of {other}")


if __name__ == "__main__":
    main()
