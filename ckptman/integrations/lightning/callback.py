"""``ModelCheckpoint``, with its files in a root."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from ckptman.errors import CkptmanError
from ckptman.format.names import check_metric
from ckptman.integrations.files import tag_of
from ckptman.integrations.lightning.paths import resume_path, split, tags
from ckptman.integrations.lightning.plugin import CkptmanCheckpointIO
from ckptman.integrations.lightning.random_streams import TrainerStreams
from ckptman.integrations.lightning.spread import SpreadSaves
from ckptman.integrations.lightning.staged import StagedSaves


class CkptmanCheckpoint(ModelCheckpoint):
    """
    ``ModelCheckpoint`` with its files in the root *dirpath*, the random streams among them.

    All arguments of ``ModelCheckpoint`` mean what they mean there; *dirpath* has to be given, since a resumed run has
    to find the same one. Saves go on in the background: training waits until the state is copied. What
    ``save_top_k`` and ``save_last`` let go is deleted once what replaces it is committed.

    ``trainer.fit(model, ckpt_path="last")`` goes on from the newest intact checkpoint, or starts afresh in a root
    without any. Weights, moments, schedules, precision, loops, callbacks and random streams come back; the place in
    the middle of an epoch where the loader has ``state_dict`` (torchdata's ``StatefulDataLoader``).

    *Not* promised: a file at ``best_model_path``, so ``load_from_checkpoint`` cannot read it: use
    ``ckpt_path=…``, or restore the component ``model`` with a `CheckpointManager`. Loggers that upload such files are
    not told of them.

    Where ranks hold parts of the model (``ModelParallelStrategy``), each saves its own; of a strategy that writes
    checkpoints its own way (FSDP, DeepSpeed) the files are saved that it writes, in the foreground: see `StagedSaves`.

    Raises:
        MisconfigurationException: As ``ModelCheckpoint``; in ``setup``, if the strategy writes its own files, and has
            no folder for them or ranks that cannot talk to each other.
    """

    def __init__(self, dirpath: str | os.PathLike[str], filename: str | None = None, **options: Any) -> None:
        super().__init__(os.fspath(dirpath), filename, **options)
        self._streams = TrainerStreams()
        self._plugin = CkptmanCheckpointIO()
        self._of_all_ranks: SpreadSaves | StagedSaves | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bring the plugin into the strategy, so that every path of ours can be loaded."""
        super().setup(trainer, pl_module, stage)
        strategy = trainer.strategy
        if isinstance(strategy.checkpoint_io, CkptmanCheckpointIO):
            self._plugin = strategy.checkpoint_io
            return
        if type(strategy).save_checkpoint is not Strategy.save_checkpoint:
            saves = SpreadSaves if isinstance(strategy, ModelParallelStrategy) else StagedSaves
            self._of_all_ranks = saves(trainer, weights_only=self.save_weights_only)
            return
        self._plugin = CkptmanCheckpointIO(fallback=strategy.checkpoint_io)
        strategy.checkpoint_io = self._plugin

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random streams of all ranks. Collective."""
        self._streams.on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the random streams."""
        self._streams.on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue from the random streams that were loaded."""
        super().on_train_start(trainer, pl_module)
        self._streams.on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until everything is committed. Raises on every rank what a save failed with on one."""
        super().on_train_end(trainer, pl_module)
        if self._of_all_ranks is not None:
            self._of_all_ranks.together.wait()
        else:
            self._on_rank_zero(trainer, self._plugin.wait)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if ``save_on_exception`` asks for it; then wait for nobody who may be gone."""
        super().on_exception(trainer, pl_module, exception)
        self._close(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the root. Raises on every rank what a save failed with on one."""
        super().teardown(trainer, pl_module, stage)
        self._close()

    def _close(self, error: BaseException | None = None) -> None:
        saves, self._of_all_ranks = self._of_all_ranks, None
        if saves is not None:
            saves.close(error)

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Whether a checkpoint of that name exists, the same answer on all ranks."""
        root, name = split(filepath)
        found = trainer.is_global_zero and tag_of(name) in tags(root)
        return bool(trainer.strategy.reduce_boolean_decision(found, all=False))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._of_all_ranks is not None:
            self._of_all_ranks.save(filepath, _numbers(trainer))
        else:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
            options = {"background": True, "metrics": _numbers(trainer)}
            self._on_rank_zero(trainer, lambda: self._plugin.save_checkpoint(checkpoint, filepath, options))
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._of_all_ranks is not None:
            self._of_all_ranks.together.remove(filepath)
        else:
            super()._remove_checkpoint(trainer, filepath)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        # a symbolic link is a second name here, which a second save gives: what did not change is not written again
        asked, self.save_last = self.save_last, bool(self.save_last)
        try:
            super()._save_last_checkpoint(trainer, monitor_candidates)
        finally:
            self.save_last = asked

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        assert self.dirpath is not None
        found = resume_path(self.dirpath)
        return set() if found is None else {found}

    def _on_rank_zero(self, trainer: Trainer, act: Callable[[], None]) -> None:
        failure: CkptmanError | None = None
        if trainer.is_global_zero:
            try:
                act()
            except CkptmanError as error:
                failure = error
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            raise failure


def _numbers(trainer: Trainer) -> dict[str, float]:
    """The metrics that are single numbers and have a name that a catalog can hold."""
    numbers = {}
    for name, value in trainer.callback_metrics.items():
        try:
            numbers[check_metric(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            continue
    return numbers
