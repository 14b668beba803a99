"""ignite: a save handler for ``ignite.handlers.Checkpoint`` that never deletes before the commit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ignite.engine import Engine
from ignite.handlers.checkpoint import BaseSaveHandler

from ckptman.integrations.files import drop, named, tag_of
from ckptman.manager import CheckpointManager
from ckptman.repository.repository import Which
from ckptman.storage.base import Storage
from ckptman.types import Checkpoint

SELF = "checkpointer"
"""The key under which ``Checkpoint(include_self=True)`` gives its own state."""


class CkptmanSaver(BaseSaveHandler):
    """
    Saves the live objects of *to_save*, and the random streams, as a checkpoint of *root*.

    ``Checkpoint`` goes on to decide when to save, under which name, and how many to keep. The name becomes a tag, the
    score a metric. Saves go on in the background: training waits until the state is copied.

    ``Checkpoint`` removes the old file before it saves the new one. Here what it removes goes before the next save, or
    in ``close``, and only once what replaced it is committed.

    Example:
        >>> import torch
        >>> from ignite.engine import Engine, Events
        >>> from ignite.handlers import Checkpoint
        >>> from ckptman.integrations.ignite import CkptmanSaver
        >>> model = torch.nn.Linear(2, 2)
        >>> trainer = Engine(lambda engine, batch: None)
        >>> to_save = {"model": model, "trainer": trainer}
        >>> with CkptmanSaver("memory://ignite", to_save, trainer) as saver:
        ...     found = saver.restore()
        ...     handler = trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, saver, n_saved=2))
        ...     state = trainer.run([0, 1, 2], max_epochs=4)
        >>> [one.step for one in saver.checkpoints()]
        [9, 12]

    Args:
        root: As for `CheckpointManager`.
        to_save: Name → object, the same as for ``Checkpoint``. Put the trainer among them, and the loader if it has
            ``state_dict``: then the middle of an epoch is resumed exactly.
        trainer: Its ``state.iteration`` is the step.
        options: Further arguments of `CheckpointManager`.
    """

    def __init__(
        self, root: str | os.PathLike[str] | Storage, to_save: Mapping[str, object], trainer: Engine, **options: Any
    ) -> None:
        self._handler: dict[str, Any] = {}
        self._manager = CheckpointManager(root, {**to_save, SELF: self._handler}, keep=named, **options)
        self._names = frozenset(to_save)
        self._trainer = trainer
        self._replaced: list[str] = []  # removed since the last save: what replaces it is not yet begun
        self._to_drop: list[str] = []  # removed before the last save

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """
        Save the live objects under *filename*. Of *checkpoint* only the state of ``Checkpoint`` itself is taken.

        Raises:
            ValueError: *checkpoint* has objects that were not given to the constructor.
            As `CheckpointManager.save`: Whatever it raises, also for an earlier save that failed.
        """
        unknown = sorted(set(checkpoint) - self._names - {SELF}) if len(self._names) > 1 else []
        if unknown:
            raise ValueError(f"Checkpoint saves {', '.join(unknown)}, of which CkptmanSaver was not told")
        tag = tag_of(filename)
        self._drop(except_for=tag)
        self._handler.clear()
        self._handler.update(checkpoint.get(SELF) or {})
        self._manager.save(self._trainer.state.iteration, tags=[tag], metrics=_score(metadata or {}))
        self._to_drop, self._replaced = self._replaced, []

    def remove(self, filename: str) -> None:
        """Let *filename* go, once what is saved next is committed."""
        self._replaced.append(tag_of(filename))

    def restore(self, which: Which = "latest") -> Checkpoint | None:
        """
        Load a checkpoint into the live objects, in place; None if the latest is asked for and there is none.

        Call it before ``trainer.run``. ``Checkpoint`` gets its own state back by ``load_state_dict(saver.handler)``.
        Promises and raises what `CheckpointManager.restore` does.
        """
        return self._manager.restore(which)

    @property
    def handler(self) -> Mapping[str, Any]:
        """The state of ``Checkpoint(include_self=True)`` that was saved or restored last; empty if there is none."""
        return self._handler

    def checkpoints(self) -> list[Checkpoint]:
        """What exists, oldest commit first. Works after ``close`` too."""
        return self._manager.checkpoints()

    def close(self) -> None:
        """Wait until everything is committed, then delete what was removed. Raises what a save failed with."""
        try:
            self._drop()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._manager.__exit__(kind, error, trace)
            return
        self.close()

    def _drop(self, *, except_for: str | None = None) -> None:
        tags, self._to_drop = self._to_drop, []
        for tag in tags:
            if tag != except_for:  # that name is about to move, and the checkpoint goes in the same commit
                drop(self._manager, tag)


def _score(metadata: Mapping[str, Any]) -> dict[str, float]:
    name, value = metadata.get("score_name"), metadata.get("priority")
    return {} if name is None or value is None else {name: float(value)}
