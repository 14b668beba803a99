"""One root that all ranks of a Trainer save to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy

from ckptman.integrations.files import named, tag_of
from ckptman.integrations.lightning.paths import locate, split
from ckptman.manager import CheckpointManager
from ckptman.repository.repository import Which

Load = Callable[[str, Which, bool | None], dict[str, Any]]
"""Loads a checkpoint of a root: the root, which one, and Lightning's ``weights_only``."""


class Loading:
    """
    Stands in for ``load_checkpoint`` of *strategy* until `stop`: what lies in a root goes to *ours*, on every rank the
    same; any other path is left to the strategy.

    Attributes:
        theirs: What the strategy itself does.
    """

    def __init__(self, strategy: Strategy, ours: Load) -> None:
        self._strategy = strategy
        self._ours = ours
        self.theirs = strategy.load_checkpoint
        strategy.load_checkpoint = self.load  # type: ignore[method-assign]  # until stop() takes it away

    def load(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """What Lightning calls. Collective."""
        place = locate(self._strategy.broadcast(os.fspath(checkpoint_path)))
        if place is None:
            return self.theirs(checkpoint_path, weights_only)
        return self._ours(*place, weights_only)

    def stop(self) -> None:
        """Give the strategy its own method back."""
        vars(self._strategy).pop("load_checkpoint", None)


class Together:
    """
    The manager of what *state* gives, at the root that was used last; and what Lightning removes there.

    Collective: every rank has one, and calls the same methods in the same order.
    """

    def __init__(self, strategy: Strategy, state: Callable[[], Mapping[str, object]]) -> None:
        self._strategy = strategy
        self._state = state
        self._root = ""
        self._manager: CheckpointManager | None = None
        self._removed: list[str] = []

    def at(self, root: str) -> CheckpointManager:
        """The manager of *root*: the same one as long as the root is."""
        if self._manager is not None and root == self._root:
            return self._manager
        if self._manager is not None:
            self._manager.close()
        self._root = root
        self._manager = CheckpointManager(root, self._state(), keep=named, rng=False)
        return self._manager

    def remove(self, path: str) -> None:
        """Let *path* go at the next `drop`."""
        self._removed.append(path)

    def drop(self) -> None:
        """Delete what was removed, once what replaces it is committed. Raises what a save failed with."""
        removed, self._removed = self._removed, []
        if not removed or self._manager is None:
            return
        self._manager.wait()
        for path in removed:
            tag = tag_of(split(path)[1])
            found = [(one.step, len(one.tags)) for one in self._manager.checkpoints() if tag in one.tags]
            for step, names in self._strategy.broadcast(found):  # as rank 0 sees it: all have to do the same
                if names == 1:
                    self._manager.delete(step)
                else:
                    self._manager.untag(step, tag)

    def wait(self) -> None:
        """Wait until everything is committed, and let go what was removed. Raises what a save failed with."""
        if self._manager is not None:
            self._manager.wait()
            self.drop()

    def leave(self, error: BaseException | None) -> None:
        """
        Wait for everything, and let go of the root; after an *error*, which others may not have, wait for nobody.

        Raises what a save failed with.
        """
        try:
            if error is None:
                self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                manager.__exit__(None if error is None else type(error), error, None)
