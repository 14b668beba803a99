"""The random streams of all ranks, for frameworks that save from one of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from ckptman.errors import FormatError
from ckptman.state.rng import GlobalStreams, put_back, snapshot
from ckptman.warning import warn

Gather = Callable[[dict[str, Any]], Sequence[dict[str, Any]]]
"""Collects one object of every rank, in the order of ranks."""


def streams_now() -> dict[str, Any]:
    """The state of this process's streams of Python, NumPy and torch, as plain values and tensors."""
    return msgspec.structs.asdict(snapshot())


def continue_from(saved: Sequence[dict[str, Any]], *, rank: int, world_size: int) -> None:
    """
    Make the streams of *rank* continue from *saved*, which has one entry for each rank that saved.

    Where as many ranks saved as are running now, each continues bit for bit. Where not, all are seeded anew from what
    was saved and the rank: reproducible, but another sequence; a warning says so.

    Raises:
        FormatError: *saved* is not what `streams_now` gave.
    """
    try:
        states = [msgspec.convert(one, GlobalStreams) for one in saved]
    except msgspec.ValidationError as error:
        raise FormatError(f"the random streams were not saved by this version of ckptman: {error}") from error
    if len(states) == world_size:
        put_back(states[rank])
        return
    warn(
        f"{len(states)} ranks saved their random streams, {world_size} run now: each is seeded anew, from what was "
        "saved and its rank"
    )
    old = b"".join(state.torch.numpy().tobytes() for state in states)
    digest = hashlib.sha256(old + f"{rank}/{world_size}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class RankStreams:
    """
    The random streams as an object with ``state_dict`` and ``load_state_dict``.

    Args:
        gather: Called on every rank by ``state_dict``; None where there is one process.
        rank: This rank.
    """

    def __init__(self, gather: Gather | None = None, *, rank: int = 0) -> None:
        self._gather = gather
        self._rank = rank

    def state_dict(self) -> dict[str, Any]:
        """The streams of all ranks. Collective where there is a *gather*."""
        mine = streams_now()
        return {"streams": [mine] if self._gather is None else list(self._gather(mine))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` gave. Raises FormatError."""
        world_size = 1 if self._gather is None else len(self._gather({}))
        continue_from(state_dict["streams"], rank=self._rank, world_size=world_size)
