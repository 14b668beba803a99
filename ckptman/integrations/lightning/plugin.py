"""The ``CheckpointIO`` plugin: wherever Lightning writes one file, a checkpoint of a root."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO

from ckptman.integrations.documents import Documents, read
from ckptman.integrations.files import tag_of
from ckptman.integrations.lightning.paths import locate, split
from ckptman.repository.repository import Repository
from ckptman.storage.opening import open_storage

NAMES = {"state_dict": "model", "optimizer_states": "optimizers"}


class CkptmanCheckpointIO(CheckpointIO):
    """
    Saves what Lightning or Fabric would write to ``folder/name.ckpt`` as a checkpoint of the root ``folder``.

    For ``Trainer(plugins=[…])`` and ``Fabric(plugins=[…])`` with strategies that let one process write the whole
    checkpoint: single device and DDP. `CkptmanCheckpoint` brings it along.

    The step is the document's ``global_step``, else one more than that of the latest checkpoint. The file's name
    becomes a tag; a name used again moves, and the checkpoint that lost its last name goes in the same commit.
    A save returns once it is durable and committed. A path that is not of a root is left to *fallback*.

    Args:
        fallback: What loads and removes other files; by default what Lightning itself would use.
        lock_timeout: Seconds to wait for another writer of the root to go away.
    """

    def __init__(self, *, fallback: CheckpointIO | None = None, lock_timeout: float = 60.0) -> None:
        self._fallback = fallback or TorchCheckpointIO()
        self._lock_timeout_s = lock_timeout
        self._roots: dict[str, Documents] = {}
        self._dropped: list[str] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
    ) -> None:
        """
        Save *checkpoint*.

        Args:
            checkpoint: The document.
            path: ``folder/name``.
            storage_options: ``background=True`` returns once it is staged, ``metrics`` are kept with it.

        Raises:
            UnsupportedState: Something in it cannot be saved without pickle; the path says what.
            LockTimeout, Fenced, SaveFailed, CommitUnknown: As `CheckpointManager.save`.
        """
        options = {"background": False, "metrics": None, **(storage_options or {})}
        if options.keys() != {"background", "metrics"}:
            raise TypeError(f"storage_options may hold 'background' and 'metrics', got {sorted(options)}")
        self._drop_what_was_replaced()
        root, name = split(path)
        self._documents(root).save(
            checkpoint,
            _step_of(checkpoint, root),
            tags=[tag_of(name)],
            metrics=options["metrics"],
            block=not options["background"],
        )

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """
        The document at *path*, with its tensors on the CPU; every byte is checked.

        Raises:
            IntegrityError: It is damaged; where *path* means the newest, all are.
            FormatError: It was not saved by a framework, or by a newer version.
        """
        self.wait()
        place = locate(path)
        if place is None:
            keywords = {} if map_location is None else {"map_location": map_location}
            return self._fallback.load_checkpoint(os.fspath(path), weights_only=weights_only, **keywords)
        return read(*place)[1]

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """
        Let the checkpoint at *path* go: before the next save, or at the end, once everything saved is committed. So
        nothing is deleted before what replaces it exists, and training does not wait for it.
        """
        self._dropped.append(os.fspath(path))

    def wait(self) -> None:
        """Wait until nothing is under way. Raises what a save failed with."""
        for documents in self._roots.values():
            documents.wait()

    def teardown(self) -> None:
        """Wait for everything, delete what was removed, let go of the roots. Raises what a save failed with."""
        try:
            self._drop_what_was_replaced()
        finally:
            roots, self._roots = self._roots, {}
            for documents in roots.values():
                documents.close()

    def _drop_what_was_replaced(self) -> None:
        if self._dropped:
            self.wait()
        while self._dropped:
            path = self._dropped.pop(0)
            root, name = split(path)
            if root in self._roots or locate(path) is not None:
                self._documents(root).drop(tag_of(name))
            else:
                self._fallback.remove_checkpoint(path)

    def _documents(self, root: str) -> Documents:
        if root not in self._roots:
            self._roots[root] = Documents(root, names=NAMES, lock_timeout=self._lock_timeout_s)
        return self._roots[root]


def _step_of(checkpoint: Mapping[str, Any], root: str) -> int:
    step = checkpoint.get("global_step")
    if isinstance(step, int):
        return step
    entries = Repository(open_storage(root)).entries()
    return entries[-1].step + 1 if entries else 0
