"""
What do a durable save and a restore of a 1.5 GB state cost, in time and memory, beside torch.save and torch.load?

    python -m benchmarks.first_look [--directory DIR] [--repetitions 5] [--parameters 124] [--json FILE]

Every measurement is a process of its own, so that no contestant inherits another's memory. Contestants are in random
order within a repetition; before each, the disk is synced, and before a load the file is dropped from the page cache
where the system allows it. ``torch.save`` is fsynced (file and folder) inside of the timer, and ``torch.load`` reads
every byte into the live objects. The floor is the same bytes with one ``write`` loop and an fsync.

What the figures do not show: object stores, several ranks, GPUs, other filesystems; asynchronous saves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ckptman import CheckpointManager


class State:
    """A stack of linear layers of *millions* of parameters in all, with AdamW moments from one real step."""

    def __init__(self, millions: int, *, trained: bool) -> None:
        torch.manual_seed(0)
        width = 2048
        layers = max(1, round(millions * 1e6 / width**2))
        self.model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        if trained:
            for parameter in self.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and moments."""
        return 3 * sum(p.numel() * p.element_size() for p in self.model.parameters())


def save_ckptman(state: State, root: Path) -> None:
    """``save(block=True)``."""
    with CheckpointManager(root, {"model": state.model, "optimizer": state.optimizer}) as manager:
        manager.save(1, block=True)


def restore_ckptman(state: State, root: Path) -> None:
    """``restore()``: verified, in place."""
    with CheckpointManager(root, {"model": state.model, "optimizer": state.optimizer}) as manager:
        assert manager.restore() is not None


def save_torch(state: State, root: Path) -> None:
    """``torch.save`` and fsync of the file and its folder."""
    root.mkdir()
    with (root / "state.pt").open("wb") as file:
        torch.save({"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    _fsync_folder(root)


def restore_torch(state: State, root: Path) -> None:
    """``torch.load`` and ``load_state_dict``."""
    loaded = torch.load(root / "state.pt", weights_only=True)
    state.model.load_state_dict(loaded["model"])
    state.optimizer.load_state_dict(loaded["optimizer"])


def save_floor(state: State, root: Path) -> None:
    """The bytes of every tensor, one after another into one file, and fsync. Nothing that could be loaded."""
    root.mkdir()
    moments = [m for s in state.optimizer.state.values() for m in s.values()]
    with (root / "raw").open("wb", buffering=0) as file:
        for tensor in [*state.model.parameters(), *moments]:
            view = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    _fsync_folder(root)


def restore_floor(state: State, root: Path) -> None:
    """The same bytes read once into one reused 8 MiB buffer."""
    buffer = bytearray(8 << 20)
    with (root / "raw").open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


CONTESTANTS: dict[str, tuple[Callable[[State, Path], None], Callable[[State, Path], None]]] = {
    "ckptman": (save_ckptman, restore_ckptman),
    "torch.save + fsync": (save_torch, restore_torch),
    "floor (raw bytes)": (save_floor, restore_floor),
}


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _rss(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _drop(root: Path) -> None:
    os.sync()
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(contestant: str, action: str, root: Path, millions: int) -> dict[str, float]:
    """Time in seconds, and how far the peak of resident memory lies above what was resident before."""
    state = State(millions, trained=action == "save")
    if action == "restore":
        _drop(root)
    Path("/proc/self/clear_refs").write_text("5")
    before = _rss("VmRSS")
    began = time.perf_counter()
    CONTESTANTS[contestant][action == "restore"](state, root)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "extra_nbytes": _rss("VmHWM") - before, "nbytes": state.nbytes}


def compare(directory: Path, repetitions: int, millions: int) -> dict[str, dict[str, float]]:
    """All contestants, saved and restored *repetitions* times; medians and spread."""
    samples: dict[str, list[dict[str, float]]] = {}
    for repetition in range(repetitions):
        order = list(CONTESTANTS)
        random.Random(repetition).shuffle(order)
        for contestant in order:
            root = directory / "root"
            shutil.rmtree(root, ignore_errors=True)
            for action in ("save", "restore"):
                os.sync()
                command = [sys.executable, "-m", "benchmarks.first_look", "--one", contestant, action, str(root)]
                done = subprocess.run([*command, "--parameters", str(millions)], check=True, stdout=subprocess.PIPE)
                samples.setdefault(f"{action}: {contestant}", []).append(json.loads(done.stdout))
            shutil.rmtree(root)
    return {name: _summary(measured) for name, measured in samples.items()}


def _summary(samples: list[dict[str, float]]) -> dict[str, float]:
    seconds = [sample["seconds"] for sample in samples]
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "extra_nbytes": statistics.median(sample["extra_nbytes"] for sample in samples),
        "nbytes": samples[0]["nbytes"],
    }


def main() -> None:
    """Run the comparison, or one measurement of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to write; the disk that is measured")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=124, help="millions; 12 bytes of state for each")
    parser.add_argument("--json", type=Path, help="where the raw result goes")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        contestant, action, root = arguments.one
        print(json.dumps(measure(contestant, action, Path(root), arguments.parameters)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        results = compare(Path(directory), arguments.repetitions, arguments.parameters)
    print(f"{'':28} {'median':>8} {'min':>8} {'max':>8} {'extra memory':>14}")
    for name, summary in sorted(results.items(), reverse=True):
        times = " ".join(f"{summary[key]:7.2f}s" for key in ("median_s", "min_s", "max_s"))
        print(f"{name:28} {times} {summary['extra_nbytes'] / 2**20:10.0f} MiB")
    if arguments.json:
        machine = {"cores": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__}
        result = {"machine": machine, "repetitions": arguments.repetitions, "results": results}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
