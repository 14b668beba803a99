"""A mirror for trainers that cannot be subclassed: keeps, whole and verified, what the Trainer itself wrote."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ckptman.coordinator import Solo
from ckptman.errors import FormatError, SaveFailed
from ckptman.integrations.transformers.parts import metrics_of
from ckptman.integrations.transformers.processes import Processes
from ckptman.manager import CheckpointManager
from ckptman.repository import keep as keep_rules
from ckptman.repository.keep import Keep
from ckptman.repository.repository import Which
from ckptman.storage.base import Storage

FILES = "files"
"""The only component of such a checkpoint: name of a file → its bytes."""


class CkptmanCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """
    After each save of the Trainer, copy its ``checkpoint-N``, every file as it is, into *root*.

    A callback can neither redirect what the Trainer writes nor what it reads. So this costs a second writing of the
    same bytes, which training waits for; pickled files are carried as bytes and never looked into; and to resume, the
    files have to be put back first, with `fetch`. In return it serves any trainer and any strategy, and *root* has what
    the output directory has not: checkpoints that are whole or absent, durable, verified, and retained by a rule. The
    Trainer's own rotation comes before this callback, and never touches *root*.

    Where you can subclass, `CkptmanMixin` is better in every respect.

    Promised: when ``train()`` goes on after a save, the copy is committed. What fails on the first rank fails on all.
    *Not* promised: files that other nodes wrote where this one does not see them; trials of a search.

    Args:
        root: Where the copies go. Not the output directory.
        keep: What to retain. The default deletes nothing.
        lock_timeout: Seconds to wait for another writer to go away.
        storage_options: For the driver of a URL such as ``s3://…``: credentials, ``endpoint_url``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        keep: Keep = keep_rules.everything,
        lock_timeout: float = 60.0,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self._files: dict[str, np.ndarray] = {}
        self._ranks: Processes | None = None
        self._manager = CheckpointManager(
            root,
            {FILES: self._files},
            keep=keep,
            rng=False,
            lock_timeout=lock_timeout,
            coordinator=Solo(),  # the first rank saves alone
            storage_options=storage_options,
        )

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Meet the other ranks."""
        self._ranks = Processes()

    def on_save(self, args: TrainingArguments, state: TrainerState, *rest: Any, **more: Any) -> None:
        """Copy what was just saved. Raises as ``CheckpointManager.save``."""
        ranks, folder = self._ranks, Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if ranks is None:
            raise ValueError("CkptmanCallback is to be added before train() begins: it meets the other ranks there")
        ranks.together(lambda: None)  # each rank has written its random state
        ranks.together(lambda: self._copy(folder, state) if ranks.is_first else None)

    def _copy(self, folder: Path, state: TrainerState) -> None:
        if not folder.is_dir():
            raise SaveFailed(
                f"{folder} is not there after the Trainer saved step {state.global_step}: this callback knows the "
                "output directory of the arguments only, and no trials of a search",
                step=state.global_step,
            )
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self._files.update({path.relative_to(folder).as_posix(): _mapped(path) for path in paths})
        try:
            self._manager.save(state.global_step, metrics=metrics_of(state), block=True)
        finally:
            self._files.clear()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Let go of the root and of the ranks."""
        self._manager.close()
        if self._ranks is not None:
            self._ranks.part()
            self._ranks.close()


def fetch(
    root: str | os.PathLike[str] | Storage,
    into: str | os.PathLike[str],
    *,
    which: Which = "latest",
    storage_options: Mapping[str, object] | None = None,
) -> str | None:
    """
    Put a checkpoint of `CkptmanCallback` back as a directory that any Trainer resumes from.

    Example:
        >>> trainer.train(resume_from_checkpoint=fetch("runs/a", "runs/a-resumed"))  # doctest: +SKIP

    Args:
        root: Where the copies are.
        into: The directory to make ``checkpoint-N`` in; what it had of this name is replaced.
        which: As in ``CheckpointManager.restore``; ``"latest"`` passes over damaged ones.
        storage_options: As in ``CheckpointManager``.

    Returns:
        The path of ``checkpoint-N``, whole and with every byte checked; None if *root* has no checkpoint.

    Takes as much memory as the checkpoint has bytes.

    Raises:
        CheckpointNotFound, IntegrityError, StorageError: As ``CheckpointManager.restore``.
        FormatError: The checkpoint is none of `CkptmanCallback`, or names a file outside of it.
    """
    files: dict[str, np.ndarray] = {}
    with CheckpointManager(
        root, {FILES: files}, rng=False, coordinator=Solo(), storage_options=storage_options
    ) as manager:
        latest = manager.latest() if which == "latest" else None
        if latest is not None and FILES not in latest.components:
            raise FormatError(f"{manager.root} has no copies of directories: CkptmanTrainer resumes from it by itself")
        found = manager.restore(which)
    if found is None:
        return None
    Path(into).mkdir(parents=True, exist_ok=True)
    target = Path(into) / f"checkpoint-{found.step}"
    with tempfile.TemporaryDirectory(prefix=".ckptman-", dir=into) as scratch:
        for name, data in files.items():
            _write(Path(scratch) / "whole" / _checked(name), data)
        shutil.rmtree(target, ignore_errors=True)
        (Path(scratch) / "whole").rename(target)
    return os.fspath(target)


def _mapped(path: Path) -> np.ndarray:
    """The bytes of *path*, read when they are needed. The Trainer does not touch a file again that it has written."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=np.uint8)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8)


def _checked(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or ":" in name:
        raise FormatError(f"{name!r} is no name of a file in a directory of the Trainer")
    return path


def _write(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())
