"""
The directories of a plain Trainer: ``checkpoint-500``, looked at without torch and without unpickling anything.

The Trainer writes into the final directory, one file after the other, and makes nothing durable; so after a kill or a
power loss the highest number may be a directory with files missing, empty, cut off, or full of zeros. What tells:

    *.safetensors            the header names the last byte, and the file ends there
    *.pt, *.pth, *.bin       zip archives, whose directory is at their end
    *.json                   is JSON

*Not* seen: bytes that changed within a file of the right size. Only a digest would tell, and there is none.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RNG = re.compile(r"rng_state_(\d+)\.pth")

_WHOLE_MODELS = ("model.safetensors", "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_HEADER_NBYTES = 100_000_000  # what the safetensors library accepts itself


def find_last_checkpoint(folder: str | os.PathLike[str], *, world_size: int | None = None) -> str | None:
    """
    The complete ``checkpoint-N`` with the highest number; None if there is none. A drop-in for ``get_last_checkpoint``.

    Example:
        >>> from ckptman.integrations.transformers import find_last_checkpoint
        >>> find_last_checkpoint("no/such/output") is None
        True

    Args:
        folder: The output directory, relative or absolute. One that does not exist has no checkpoints. Backslashes
            separate too, on every system, unless there is a folder whose name has them.
        world_size: How many ranks saved. None: as many as there are random states, without a gap.

    Returns:
        ``folder`` joined with the directory's name: relative if *folder* is.

    Complete means: the model (whole, in shards with all of them, or as an adapter), ``optimizer.pt``, ``scheduler.pt``,
    the random state of every rank and ``trainer_state.json`` are there, and none of them is empty or cut off. What
    ``save_only_model`` leaves out counts as missing, and the sharded directories of DeepSpeed and FSDP, whose files do
    not tell whether they are all there, count as incomplete. *Not* seen: damage that leaves sizes and ends as they are.

    Raises:
        NotADirectoryError: *folder* is a file.
        OSError: The folder cannot be listed.
    """
    base = _existing(os.fspath(folder))
    if base is None:
        return None
    names = [path.name for path in Path(base).iterdir()]
    numbered = sorted(((int(match[1]), name) for name in names if (match := _CHECKPOINT.fullmatch(name))), reverse=True)
    paths = (os.path.join(base, name) for _, name in numbered)
    return next((path for path in paths if not faults(path, world_size=world_size)), None)


def _existing(folder: str) -> str | None:
    """*folder* as it is or with its backslashes turned; None if there is neither."""
    for path in (folder, folder.replace("\\", "/")):
        if os.path.lexists(path):
            return path
    return None


def faults(folder: str | os.PathLike[str], *, world_size: int | None = None) -> list[str]:
    """
    Why the directory *folder* of a plain Trainer cannot be resumed from; nothing if it is complete.

    Args: as `find_last_checkpoint`.
    """
    path = _existing(os.fspath(folder))
    if path is None or not Path(path).is_dir():
        return ["there is no such directory"]
    return list(_faults(Path(path), world_size))


def _faults(folder: Path, world_size: int | None) -> Iterator[str]:
    if (folder / "checkpoint-is-incomplete.txt").exists():
        yield "the Trainer marked it as incomplete"
    yield from _model_faults(folder)
    yield from _zip_faults(folder, "optimizer.pt", "optimizer.bin")
    yield from _zip_faults(folder, "scheduler.pt")
    if (folder / "scaler.pt").exists():
        yield from _zip_faults(folder, "scaler.pt")
    for name in _rng_files(folder, world_size):
        yield from _zip_faults(folder, name)
    state = _json(folder / "trainer_state.json")
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        yield "trainer_state.json is missing or cut off"


def _rng_files(folder: Path, world_size: int | None) -> list[str]:
    ranks = [int(match[1]) for path in folder.iterdir() if (match := _RNG.fullmatch(path.name))]
    count = world_size or max(ranks, default=0) + 1
    if count == 1 and not ranks:
        return ["rng_state.pth"]
    return [f"rng_state_{rank}.pth" for rank in range(count)]


def _model_faults(folder: Path) -> Iterator[str]:
    for name in _WHOLE_MODELS:
        if (folder / name).exists():
            yield from _file_faults(folder / name)
            return
    for name in _INDICES:
        if (folder / name).exists():
            yield from _sharded_faults(folder, name)
            return
    adapters = [path for name in _ADAPTERS for path in (folder / name, *folder.glob(f"*/{name}")) if path.exists()]
    if not adapters:
        yield "there is no model"
    for path in adapters:
        yield from _file_faults(path)
        if not isinstance(_json(path.with_name("adapter_config.json")), dict):
            yield "adapter_config.json is missing or cut off"


def _sharded_faults(folder: Path, name: str) -> Iterator[str]:
    index = _json(folder / name)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        yield f"{name} is cut off"
        return
    for shard in sorted(set(shards.values())):
        yield from _file_faults(folder / PureWindowsPath(shard).name)


def _file_faults(path: Path) -> Iterator[str]:
    is_whole = _is_whole_safetensors if path.suffix == ".safetensors" else _is_whole_zip
    if not path.is_file():
        yield f"{path.name} is missing"
    elif not is_whole(path):
        yield f"{path.name} is empty or cut off"


def _zip_faults(folder: Path, *names: str) -> Iterator[str]:
    """Of the first of *names* that is there, or the first."""
    yield from _file_faults(next((folder / name for name in names if (folder / name).exists()), folder / names[0]))


def _is_whole_safetensors(path: Path) -> bool:
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return False
        (header_nbytes,) = struct.unpack("<Q", start)
        if not 2 <= header_nbytes <= min(_MAX_HEADER_NBYTES, nbytes - 8):
            return False
        header = _parsed(file.read(header_nbytes))
    if not isinstance(header, dict):
        return False
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (TypeError, KeyError, IndexError, ValueError):
        return False
    end: int = 8 + header_nbytes + max(ends, default=0)
    return end == nbytes


def _is_whole_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return False


def _json(path: Path) -> Any:
    try:
        return _parsed(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        return None


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
