"""
A checkpoint of other ranks than these: what becomes of what each rank had of its own.

    random streams                 seeded anew from (what was saved, step, rank), with a warning
    loaders                        given to ``load_state_dicts`` where they have it; a difference otherwise
    other objects, where ranks     the same
    differed
    modules, optimizers            what rank 0 had, with a warning where ranks differed
    anything else, where ranks     a difference: it is left as it is with ``strict=False``
    differed

What is equal on all ranks is restored as ever, and DTensors are resharded; neither is of any concern here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckptman.format.manifest import Manifest, Tensor
from ckptman.format.ranks import component_of, ranks_with_own
from ckptman.state import rng
from ckptman.state.filling import Filling, Give, Phase, give_back
from ckptman.state.stored import Stored
from ckptman.state.trees import give_tree

_HOOK = "load_state_dicts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reranking:
    """A restore on other ranks than saved: on *rank* of *world_size*."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    differing: Mapping[str, set[int]]
    rank: int
    world_size: int

    @classmethod
    def of(cls, manifest: Manifest, tensors: Mapping[str, Tensor], rank: int, world_size: int) -> Reranking | None:
        """How *manifest* is to be restored here; None where as many ranks saved it."""
        if manifest.world_size == world_size:
            return None
        return cls(
            manifest=manifest,
            tensors=tensors,
            differing=ranks_with_own(manifest),
            rank=rank,
            world_size=world_size,
        )

    def prepare(self, live: object, name: str, filling: Filling) -> bool:
        """Prepare the component *name*, if being on other ranks means anything to it; return whether that is done."""
        kind = self.manifest.components[name].kind
        if kind in _SEEDED and (self.differing[name] or kind == "rng"):
            filling.warnings.append(f"{name}: {self._were()}; it is seeded anew from what was saved, step and rank")
            seed = self._seed(name)
            filling.later(_SEEDED[kind], lambda: _reseed(live, seed))
            return True
        if kind in ("module", "optimizer"):
            is_put_together = kind == "optimizer" and Stored(self.manifest, name, self.tensors).is_sharded
            if self.differing[name] and not is_put_together:
                filling.warnings.append(f"{name}: {self._were()} and differed in it; all ranks get what rank 0 had")
            return False
        if not self.differing[name] and kind != "loader":
            return False
        if callable(getattr(live, _HOOK, None)):
            self._give_all(live, name, filling)
        else:
            filling.differences.tolerable(
                f"{name}: {self._were()}, each had a state of its own, and there is no {_HOOK}(states) that could "
                "spread these over other ranks; strict=False leaves it as it is"
            )
        return True

    def _were(self) -> str:
        return f"{self.manifest.world_size} ranks saved it, {self.world_size} restore it"

    def _seed(self, name: str) -> int:
        saved = component_of(self.manifest, name, 0).values
        text = b"%d %d %d " % (self.manifest.step, self.rank, self.world_size) + bytes(saved)
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")

    def _give_all(self, live: Any, name: str, filling: Filling) -> None:
        gives: list[Give] = []
        for rank in range(self.manifest.world_size):
            stored = Stored(self.manifest, name, self.tensors, rank=rank)
            gives.append(give_tree(None, stored.tree, stored, filling))

        def load() -> None:
            states = [give() for give in gives]
            if self.manifest.components[name].kind == "loader":
                states = [state["loader"] for state in states if isinstance(state, dict)]
            give_back(name, lambda: live.load_state_dicts(states))

        filling.later(Phase.OTHERS, load)


def _reseed(live: Any, seed: int) -> None:
    if isinstance(live, torch.Generator):
        live.manual_seed(seed)
    elif isinstance(live, np.random.Generator):
        live.bit_generator.state = type(live.bit_generator)(seed).state
    elif isinstance(live, np.random.RandomState):
        live.seed(seed % 2**32)
    else:
        rng.seed(seed)


_SEEDED: dict[str, Phase] = {
    "rng": Phase.RNG,
    "torch-generator": Phase.OTHERS,
    "numpy-generator": Phase.OTHERS,
    "numpy-random-state": Phase.OTHERS,
}
