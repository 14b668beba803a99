"""
Ray Train: report and restore through a pointer.

Ray copies the directory of every checkpoint that is reported to its own storage. Here that directory holds one small
file that names a root and a step; the bytes stay in the root, written once, verified and borrowed as ever.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from ray import train

from ckptman.errors import FormatError
from ckptman.manager import CheckpointManager
from ckptman.pipeline.background import PendingSave
from ckptman.types import Checkpoint

POINTER = "ckptman-pointer.json"


class Pointer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is in the directory that Ray keeps: the root, without credentials, and the step. ``format`` is 1."""

    root: str
    step: int
    format: int = 1


def report(manager: CheckpointManager, saved: PendingSave | Checkpoint | None, metrics: Mapping[str, Any]) -> None:
    """
    ``ray.train.report`` of *metrics*, with a pointer to what was *saved*. To be called by every worker equally often.

    Waits until the checkpoint is committed: Ray never hears of one that does not exist.

    Args:
        manager: What saved.
        saved: What ``save`` or ``maybe_save`` returned; None reports metrics only.
        metrics: As for ``ray.train.report``.

    Raises:
        SaveFailed, Fenced, CommitUnknown: The save failed, and nothing was reported.
    """
    checkpoint = saved.result() if isinstance(saved, PendingSave) else saved
    if checkpoint is None or train.get_context().get_world_rank() != 0:
        train.report(dict(metrics))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_pointer(Path(folder), Pointer(root=manager.root, step=checkpoint.step))
        train.report(dict(metrics), checkpoint=train.Checkpoint.from_directory(folder))


def restore(manager: CheckpointManager, checkpoint: train.Checkpoint | None = None) -> Checkpoint | None:
    """
    Restore what Ray wants to go on from, into the live objects of *manager*.

    That is *checkpoint*, by default what ``ray.train.get_checkpoint()`` gives. If it gives none, as in a new job over
    an old root, or if retention has dropped that one in favour of newer ones, it is the newest intact one of the root.

    Returns:
        The checkpoint; None on a first run.

    Raises:
        ValueError: The pointer names another root: open a manager on `pointer_of` ``(checkpoint).root``.
        FormatError: *checkpoint* holds no pointer.
        As `CheckpointManager.restore`: Whatever it raises.
    """
    wanted = checkpoint or train.get_checkpoint()
    if wanted is None:
        return manager.restore()
    pointer = pointer_of(wanted)
    if pointer.root != manager.root:
        raise ValueError(
            f"Ray wants step {pointer.step} of {pointer.root}, and this manager is of {manager.root}: open one there"
        )
    steps = [one.step for one in manager.checkpoints()]
    is_dropped = pointer.step not in steps and max(steps, default=-1) > pointer.step
    return manager.restore("latest" if is_dropped else pointer.step)


def pointer_of(checkpoint: train.Checkpoint) -> Pointer:
    """The root and the step that *checkpoint* points at. Raises FormatError if it is no pointer of ours."""
    with checkpoint.as_directory() as folder:
        path = Path(folder) / POINTER
        try:
            pointer = msgspec.json.decode(path.read_bytes(), type=Pointer)
        except (FileNotFoundError, msgspec.MsgspecError) as error:
            raise FormatError(f"{checkpoint} holds no {POINTER} that this version of ckptman can read") from error
    if pointer.format != 1:
        raise FormatError(f"{POINTER} is of format {pointer.format}, this version of ckptman knows 1")
    return pointer


def write_pointer(folder: Path, pointer: Pointer) -> None:
    """Write *pointer* into *folder*, which is then what Ray may keep."""
    (folder / POINTER).write_bytes(msgspec.json.encode(pointer))
