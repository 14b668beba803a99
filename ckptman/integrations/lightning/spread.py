"""Strategies that spread the model over ranks: its live parts and those of its optimizers, saved by all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn

from ckptman.integrations.documents import DOCUMENT, Part, rest_of, without_parts
from ckptman.integrations.files import tag_of
from ckptman.integrations.lightning.paths import split
from ckptman.integrations.lightning.together import Loading, Together
from ckptman.repository.repository import Which

_STATES = ("state_dict", "optimizer_states")


class SpreadSaves:
    """
    Saves a Trainer whose ranks each hold a part of the model (FSDP2, tensor parallelism), and loads it again.

    Module and optimizers are handed to a `CheckpointManager` as they are: nothing is gathered or copied to one rank, no
    optimizer makes a step to have a state, and they are restored in place, moments in their exact dtype, on any number
    of ranks. All else that Lightning saves is the component ``document``.

    Collective: every rank has one, and calls the same methods in the same order.

    Args:
        trainer: Its strategy asks this, and no longer itself, for what lies in a root.
        weights_only: Leave the optimizers out.

    Attributes:
        together: The root.
    """

    def __init__(self, trainer: Trainer, *, weights_only: bool) -> None:
        self._trainer = trainer
        self._weights_only = weights_only
        self._document = Part({})
        self.together = Together(trainer.strategy, self._state)
        self._loading = Loading(trainer.strategy, self.load)

    def save(self, path: str, metrics: Mapping[str, float]) -> None:
        """Save as *path*, with the *metrics* of rank 0. Returns once it is staged; raises on all ranks alike."""
        trainer, (root, name) = self._trainer, split(path)
        manager = self.together.at(root)
        self.together.drop()
        with _leaving_out_states(trainer.strategy):
            document = trainer._checkpoint_connector.dump_checkpoint(self._weights_only)
        for key in _STATES:
            document.pop(key, None)
        self._document.content = without_parts(document, {"state_dict": "model"})
        manager.save(trainer.global_step, tags=[tag_of(name)], metrics=trainer.strategy.broadcast(dict(metrics)))

    def load(self, root: str, which: Which, weights_only: bool | None = None) -> dict[str, Any]:
        """
        Restore *which* of *root* into the live objects, and give Lightning the rest.

        Raises:
            StateMismatch, IntegrityError, StorageError: As `CheckpointManager.restore`, on all ranks alike.
        """
        is_resumed = self._trainer.state.fn == TrainerFn.FITTING
        self.together.at(root).restore(
            which,
            only=None if is_resumed else {"model", DOCUMENT},
            strict=self._trainer.lightning_module.strict_loading,
        )
        return rest_of(self._document.content)

    def close(self, error: BaseException | None = None) -> None:
        """
        Leave the strategy and the root, as `Together.leave`; without an *error* wait for everything first.

        Raises what a save failed with.
        """
        self._loading.stop()
        self.together.leave(error)

    def _state(self) -> dict[str, object]:
        strategy = self._trainer.strategy
        optimizers = [] if self._weights_only else strategy.optimizers
        numbered = {"optimizer" if not index else f"optimizer-{index}": one for index, one in enumerate(optimizers)}
        return {"model": strategy.model, **numbered, DOCUMENT: self._document}


@contextmanager
def _leaving_out_states(strategy: Strategy) -> Iterator[None]:
    """While a checkpoint is dumped, let *strategy* gather neither weights nor moments."""
    strategy.lightning_module_state_dict = dict  # type: ignore[method-assign]  # hides the class's own, as below
    strategy.optimizer_state = lambda optimizer: {}  # type: ignore[method-assign]  # until the block ends
    try:
        yield
    finally:
        del strategy.lightning_module_state_dict
        del strategy.optimizer_state
