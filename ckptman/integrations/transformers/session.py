"""One call of ``train``: which checkpoint it continues, and the manager of its live objects."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import Trainer

from ckptman.integrations.transformers.choosing import BEST, Resume, choose
from ckptman.integrations.transformers.parts import Held, metrics_of, rank_values, trainer_values
from ckptman.manager import CheckpointManager
from ckptman.repository.keep import Keep
from ckptman.storage.base import Storage

_log = logging.getLogger("ckptman")

TRAINER_STATE = "trainer_state.json"


class Session:
    """
    Between the Trainer, which wants a directory to resume from, and the manager, which wants live objects.

    The directory exists, holds nothing but the Trainer's own state, and stands for the checkpoint of `step`.

    Attributes:
        step: The checkpoint that is continued; None for a fresh start.
        directory: What to hand to the Trainer as ``resume_from_checkpoint``; None for a fresh start.
        best_step: The checkpoint of the best model so far.
    """

    def __init__(self, storage: Storage, *, resume: Resume, keep: Keep, lock_timeout: float) -> None:
        self._storage = storage
        self._keep = keep
        self._lock_timeout_s = lock_timeout
        self._manager: CheckpointManager | None = None
        self._ranks: Held | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.step = choose(storage, resume)
        self.directory: str | None = None
        self.best_step: int | None = None
        if self.step is not None:
            self._peek(self.step)

    def _peek(self, step: int) -> None:
        """Read the Trainer's own state, and nothing else, of the checkpoint that will be restored."""
        held = Held(dict)
        with CheckpointManager(self._storage, {"trainer": held}, rng=False) as reader:
            reader.restore(step, only={"trainer"})
        assert held.value is not None
        self.best_step = held.value["best_step"]
        # the Trainer would look for a directory of this name, and warn that there is none
        state = {**held.value["state"], "best_model_checkpoint": None}
        self._folder = tempfile.TemporaryDirectory(prefix="ckptman-resume-")
        self.directory = self._folder.name
        (Path(self.directory) / TRAINER_STATE).write_text(json.dumps(state), encoding="utf-8")

    # ------------------------------------------------------------------ the live objects

    def open(self, trainer: Trainer) -> None:
        """Manage the live objects of *trainer*, which are all there now; instead of earlier ones, if there were."""
        self.close()
        self._ranks = Held(lambda: {"ranks": [rank_values(trainer)]})
        state: dict[str, object] = {
            "model": trainer.model,
            "optimizer": _unwrapped(trainer.optimizer),
            "scheduler": trainer.lr_scheduler,
            "trainer": Held(lambda: {"state": trainer_values(trainer), "best_step": self.best_step}),
            "ranks": self._ranks,
        }
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None:
            state["scaler"] = scaler
        self._manager = CheckpointManager(
            self._storage, state, keep=self._keep, rng=False, lock_timeout=self._lock_timeout_s
        )

    @property
    def is_open(self) -> bool:
        """Whether live objects are managed."""
        return self._manager is not None

    def restore(self) -> None:
        """
        Restore `step` into all live objects at once. What the Trainer takes later is held until then.

        Raises:
            StateMismatch, IntegrityError, StorageError: As ``CheckpointManager.restore``.
        """
        assert self._manager is not None
        assert self.step is not None
        self._manager.restore(self.step)
        self._keep_best()

    def _keep_best(self) -> None:
        """What this run takes for the best must not be pruned, whatever later runs in this root took for it."""
        assert self._manager is not None
        if self.best_step is None:
            return
        tags = {one.step: one.tags for one in self._manager.checkpoints()}
        if self.best_step not in tags:
            _log.warning(
                "step %d, the best so far of the resumed run, is not in %s any more", self.best_step, self._storage.url
            )
            self.best_step = None
        elif BEST not in tags[self.best_step]:
            self._manager.tag(self.best_step, BEST)

    def of_this_rank(self, rank: int) -> dict[str, Any] | None:
        """What was restored for *rank* alone; None if nothing was, or the checkpoint had fewer ranks."""
        if self._ranks is None or self._ranks.value is None:
            return None
        ranks = self._ranks.value["ranks"]
        return ranks[rank] if rank < len(ranks) else None

    # ------------------------------------------------------------------ saving, and the best model

    def save(self, trainer: Trainer) -> None:
        """Save the live state as the step that it is at. Returns once it is staged. Raises as the manager does."""
        assert self._manager is not None
        state = trainer.state
        is_best = state.best_global_step == state.global_step > 0
        if is_best:
            self.best_step = state.global_step
            state.best_model_checkpoint = self.name_of_best()
        self._manager.save(state.global_step, metrics=metrics_of(state), tags=(BEST,) if is_best else ())

    def name_of_best(self) -> str | None:
        """What stands for the best checkpoint in ``TrainerState.best_model_checkpoint``: no path, but for people."""
        return None if self.best_step is None else f"step {self.best_step} of {self._storage.url}"

    def restore_best(self) -> None:
        """Load the best model into the live one, once all saves are committed. Raises as ``restore``."""
        assert self._manager is not None
        assert self.best_step is not None
        self._manager.restore(self.best_step, only={"model"})

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Wait for what is under way. Raises what went wrong with it."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.__exit__(kind, error, trace)
        finally:
            if self._folder is not None:
                self._folder.cleanup()


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself: accelerate puts a wrapper of the same class around it."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
