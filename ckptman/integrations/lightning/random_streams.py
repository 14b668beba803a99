"""What Lightning leaves out of its checkpoints, the random streams, or loads inexactly, the moments."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from ckptman.integrations.lightning.moments import uncast
from ckptman.integrations.streams import Gather, RankStreams, continue_from

KEY = "ckptman"


class TrainerStreams(Callback):
    """
    Saves the random streams of every rank with each checkpoint of a ``Trainer``, and continues them on resume; and puts
    moments back in their own dtype, where Lightning's loading has cast them to that of the parameter.

    `CkptmanCheckpoint` does this already; this is for ``ModelCheckpoint`` beside the `CkptmanCheckpointIO` plugin.

    The streams are put back in ``on_train_start``, after the loaders were made and before the first batch is fetched.
    *Not* covered: random numbers that a hook running later in ``on_train_start`` draws, and the streams within the
    worker processes of a loader.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._moments: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the streams of all ranks to *checkpoint*. Collective."""
        if KEY in checkpoint:
            return
        gather = gather_over(trainer.world_size)
        streams = RankStreams(gather, rank=trainer.global_rank).state_dict()["streams"]
        in_epoch = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        checkpoint[KEY] = {"streams": streams, "in_epoch": in_epoch}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the streams and moments of *checkpoint*, if it has any."""
        self._loaded = checkpoint.get(KEY)
        is_resumed = trainer.state.fn == TrainerFn.FITTING and trainer.strategy.lightning_restore_optimizer
        self._moments = checkpoint.get("optimizer_states", []) if is_resumed else []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue from the streams and the moments that were loaded."""
        moments, self._moments = self._moments, []
        uncast(trainer.strategy.optimizers, moments)
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        continue_from(loaded["streams"], rank=trainer.global_rank, world_size=trainer.world_size)
        fetcher = trainer.fit_loop._data_fetcher
        if not loaded["in_epoch"] and fetcher is not None:
            # an uninterrupted run would make the iterator of the next epoch now, and draw its seed from these streams
            iter(fetcher)


class FabricStreams(RankStreams):
    """
    The random streams of every rank, to be put into the state of ``Fabric.save`` and ``Fabric.load``.

    Example:
        ``state = {"model": model, "optimizer": optimizer, "streams": FabricStreams(fabric)}``. Loading puts them back
        at once, so load last, after loaders were made.
    """

    def __init__(self, fabric: Fabric) -> None:
        super().__init__(gather_over(fabric.world_size), rank=fabric.global_rank)


def gather_over(world_size: int) -> Gather | None:
    """What collects one object of each rank; None where there is one rank."""
    if world_size == 1:
        return None

    def gather(mine: dict[str, Any]) -> list[dict[str, Any]]:
        everyone: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    return gather
