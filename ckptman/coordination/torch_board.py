"""
The board of a process group: the store with which its ranks found each other.

Not a group of collectives, on purpose: see docs/design/0010-ranks-and-preemption.md. In short, a collective that waits
cannot be left, a gloo pair that timed out is closed for good, and making a group is itself collective and changes
state that the training's own groups share. The store knows none of that: it is a dictionary behind a socket, and every
connection of ours is our own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, only not to its stubs

from ckptman.errors import StorageError

__all__ = ["PrefixStore", "Store", "TorchBoard", "connection", "lives_in_rank_0", "reporting"]

PART_NBYTES = 4 << 20
"""A TCPStore takes values of 8 MiB at most."""


class TorchBoard:
    """
    Keys below *prefix* in the *store* of a process group.

    A value larger than `PART_NBYTES` is pinned in parts, and then its key with their number.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        self._shared = store
        self._prefix = prefix
        self._store = PrefixStore(prefix, connection(store))
        self._parts: dict[str, int] = {}  # of what was read or pinned here, to remove them too

    @property
    def beat_s(self) -> float:
        """2 seconds: a count in a dictionary costs nothing."""
        return 2.0

    @property
    def max_pause_s(self) -> float:
        """10 ms for few ranks, up to half a second for many, since one process serves all."""
        return min(0.5, 0.01 + dist.get_world_size() / 2000) if dist.is_initialized() else 0.5

    @property
    def keeper(self) -> int | None:
        """Rank 0, or the launcher beside it."""
        return 0

    def connect(self) -> TorchBoard:
        """The same board, over a connection of its own."""
        return TorchBoard(self._shared, self._prefix)

    def pin(self, key: str, value: bytes) -> None:
        """Set *key*, its parts before it. See `Board.pin`."""
        with reporting():
            starts = range(PART_NBYTES, len(value), PART_NBYTES)
            for count, start in enumerate(starts, 1):
                self._set(f"{key}/{count}", value[start : start + PART_NBYTES])
            self._set(key, len(starts).to_bytes(4, "big") + value[:PART_NBYTES])
            self._parts[key] = len(starts)

    def pin_first(self, key: str, value: bytes) -> bytes:
        """Set *key* to *value*, a small text, unless it is set; return what is there. See `Board.pin_first`."""
        with reporting():
            found = self._store.compare_set(key, "", (bytes(4) + value).decode())
            return bytes(found)[4:]

    def has(self, key: str) -> bool:
        """Whether *key* is set. See `Board.has`."""
        with reporting():
            return bool(self._store.check([key]))

    def read(self, key: str) -> bytes:
        """The value with its parts. See `Board.read`."""
        with reporting():
            first = bytes(self._store.get(key))
            count = int.from_bytes(first[:4], "big")
            self._parts[key] = count
            return b"".join([first[4:], *(bytes(self._store.get(f"{key}/{n}")) for n in range(1, count + 1))])

    def remove(self, keys: list[str]) -> None:
        """Delete *keys* and their parts. See `Board.remove`."""
        with reporting():
            for key in keys:
                self._store.delete_key(key)
                for count in range(1, self._parts.pop(key, 0) + 1):
                    self._store.delete_key(f"{key}/{count}")

    def beat(self, rank: int, count: int) -> None:
        """Set the count of *rank*."""
        with reporting():
            self._store.set(f"beat.{rank}", str(count))

    def beats(self, ranks: list[int]) -> dict[int, int]:
        """The counts of those that have one."""
        with reporting():
            keys = {rank: f"beat.{rank}" for rank in ranks}
            heard = keys if self._store.check(list(keys.values())) else self._heard(keys)
            if not heard:
                return {}
            counts = [self._store.get(key) for key in heard.values()]
            return {rank: int(count) for rank, count in zip(heard, counts, strict=True)}

    def _heard(self, keys: dict[int, str]) -> dict[int, str]:
        return {rank: key for rank, key in keys.items() if self._store.check([key])}

    def _set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]  # takes bytes too, whatever its stub says

    def close(self) -> None:
        """Nothing to let go of but the connection, which goes with this object."""


def connection(store: Store) -> Store:
    """
    The same store over a socket of our own, where it is one that has sockets.

    The training's own may be held for minutes by somebody who waits in it (a group that is being made).
    """
    try:
        return cast(Store, store.clone())  # type: ignore[attr-defined]  # newer than its stubs
    except (AttributeError, RuntimeError, NotImplementedError):  # an older torch, or a store of somebody's own
        return store


def lives_in_rank_0(store: Store, environ: Mapping[str, str] = os.environ) -> bool:
    """
    Whether *store* ends with the process of rank 0, as far as torch's own ways of making one tell.

    torchrun's agent serves the store of its workers and outlives them, unless it was told not to. A store of files, or
    of somebody's own, serves itself.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return isinstance(store, TCPStore) and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


@contextmanager
def reporting() -> Iterator[None]:
    """Turn what torch raises where its store does not answer into a `StorageError`."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError and its like
        first = str(error).partition("\n")[0]
        raise StorageError(f"the store of the process group: {first}") from error
