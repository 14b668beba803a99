"""One call of ``train``: which checkpoint it continues, and the manager of its live objects."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from transformers import Trainer

from ckptman.coordinator import Solo
from ckptman.errors import Preempted
from ckptman.format.values import from_json, to_json
from ckptman.integrations.transformers.choosing import BEST, Resume, choose
from ckptman.integrations.transformers.parts import Held, configs, metrics_of, rank_values, trainer_values
from ckptman.integrations.transformers.processes import Processes
from ckptman.manager import CheckpointManager
from ckptman.pipeline.budget import Limits
from ckptman.preemption import Notices
from ckptman.repository.keep import Keep
from ckptman.storage.base import Storage

_log = logging.getLogger("ckptman")

TRAINER_STATE = "trainer_state.json"


class Session:
    """
    Between the Trainer, which wants a directory to resume from, and the manager, which wants live objects.

    The directory exists, holds nothing but the Trainer's own state, and stands for the checkpoint of `step`.

    Collective: every rank has one, and calls the same methods in the same order. The first one saves.

    Attributes:
        step: The checkpoint that is continued; None for a fresh start.
        directory: What to hand to the Trainer as ``resume_from_checkpoint``; None for a fresh start.
        best_step: The checkpoint of the best model so far.
    """

    def __init__(self, storage: Storage, *, resume: Resume, keep: Keep, lock_timeout: float) -> None:
        self._storage = storage
        self._ranks = Processes()
        self._keep = keep
        self._lock_timeout_s = lock_timeout
        self._manager: CheckpointManager | None = None
        self._own = Held(dict)
        self._said: list[dict[str, Any]] = []  # by each rank, for the save that is being made
        self._notices = Notices()
        self._notice = ""  # of the end of this process, agreed on by all ranks
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.directory: str | None = None
        self.best_step: int | None = None
        try:
            self.step = self._ranks.on_first(lambda: choose(storage, resume))
            if self.step is not None:
                self._ranks.together(self._peek)
        except BaseException:
            self._leave()
            raise

    def _peek(self) -> None:
        """Read the Trainer's own state, and nothing else, of the checkpoint that will be restored."""
        assert self.step is not None
        held = Held(dict)
        with CheckpointManager(
            self._storage, {"trainer": held}, rng=False, limits=_READING, coordinator=Solo()
        ) as reader:
            reader.restore(self.step, only={"trainer"})
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
        self._own = Held(lambda: {"ranks": self._said})
        state: dict[str, object] = {
            "model": trainer.model,
            "optimizer": _unwrapped(trainer.optimizer),
            "scheduler": trainer.lr_scheduler,
            "trainer": Held(lambda: {"state": trainer_values(trainer), "best_step": self.best_step}),
            "ranks": self._own,
            "config": configs(trainer.model),
        }
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None:
            state["scaler"] = scaler
        self._manager = CheckpointManager(
            self._storage,
            state,
            keep=self._keep,
            rng=False,
            lock_timeout=self._lock_timeout_s,
            coordinator=Solo(),  # the first rank saves alone, and each restores for itself
            limits=Limits() if self._ranks.is_first else _READING,
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
        manager, step = self._manager, self.step
        assert manager is not None
        assert step is not None
        self._ranks.together(lambda: manager.restore(step))
        self.best_step = self._ranks.on_first(lambda: self._kept_best(manager))
        saved = len(self._own.value["ranks"]) if self._own.value else 0
        if saved != self._ranks.count:
            _log.warning(
                "step %d was saved by %d ranks, and this run has %d: random streams and data order are not continued "
                "as they would have been",
                step,
                saved,
                self._ranks.count,
            )

    def _kept_best(self, manager: CheckpointManager) -> int | None:
        """
        The best step of the resumed run, tagged; None if it is not there any more.

        It must not be pruned, whatever a later run in this root took for the best.
        """
        if self.best_step is None:
            return None
        tags = {one.step: one.tags for one in manager.checkpoints()}
        if self.best_step not in tags:
            _log.warning(
                "step %d, the best so far of the resumed run, is not in %s any more", self.best_step, self._storage.url
            )
            return None
        if BEST not in tags[self.best_step]:
            manager.tag(self.best_step, BEST)
        return self.best_step

    def of_this_rank(self) -> dict[str, Any] | None:
        """What was restored for this rank alone; None if nothing was, or the checkpoint had fewer ranks."""
        ranks = self._own.value["ranks"] if self._own.value else []
        return ranks[self._ranks.rank] if self._ranks.rank < len(ranks) else None

    # ------------------------------------------------------------------ saving, and the best model

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 for notices from now on."""
        self._notices.install()

    def is_preempted(self) -> bool:
        """Whether the first rank has got a notice: schedulers send it to all ranks, at slightly different steps."""
        self._notice = self._notice or self._ranks.of_first((self._notices.received or "").encode()).decode()
        return bool(self._notice)

    def save(self, trainer: Trainer, ahead: dict[str, Any] | None) -> None:
        """
        Save the live state as the step that it is at, and the streams *ahead* of which a batch was fetched already.

        Returns once it is staged.

        Raises:
            Preempted: A notice had arrived, and the checkpoint is committed.
            UnsupportedState, SaveFailed, LockError, CommitUnknown: As ``CheckpointManager.save``, on all ranks.
        """
        state = trainer.state
        is_best = state.best_global_step == state.global_step > 0
        if is_best:
            self.best_step = state.global_step
            state.best_model_checkpoint = self.name_of_best()
        said = self._ranks.exchange(to_json({**rank_values(trainer), "ahead": ahead}, "ranks"))

        def save() -> None:
            assert self._manager is not None
            self._said = [cast(dict[str, Any], from_json(one)) for one in said]
            self._manager.save(
                state.global_step,
                metrics=metrics_of(state),
                tags=(BEST,) if is_best else (),
                block=bool(self._notice),
            )

        self._ranks.together(save if self._ranks.is_first else _nothing)
        if self._notice:
            self._ranks.part()
            raise Preempted(
                f"{self._notice} arrived; step {state.global_step} is saved in {self._storage.url}",
                step=state.global_step,
            )

    def name_of_best(self) -> str | None:
        """What stands for the best checkpoint in ``TrainerState.best_model_checkpoint``: no path, but for people."""
        return None if self.best_step is None else f"step {self.best_step} of {self._storage.url}"

    def restore_best(self) -> None:
        """Load the best model into the live one, once all saves are committed. Raises as ``restore``."""
        manager, step = self._manager, self.best_step
        assert manager is not None
        assert step is not None
        self._ranks.together(manager.wait)
        self._ranks.together(lambda: manager.restore(step, only={"model"}))

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
            if error is None:
                self._ranks.together(self.close)
                self._ranks.part()
            elif self._manager is not None:  # the other ranks are elsewhere: nothing is agreed any more
                self._manager.__exit__(kind, error, trace)
        finally:
            self._leave()

    def _leave(self) -> None:
        self._notices.uninstall()
        self._ranks.close()
        if self._folder is not None:
            self._folder.cleanup()


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself: accelerate puts a wrapper of the same class around it."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _nothing() -> None:
    pass


_READING = Limits(prefault=False)
"""For a manager that never saves: it needs no staging memory."""
