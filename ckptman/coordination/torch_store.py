"""
The ranks of a ``torch.distributed`` job, which meet at the store that the job was started with.

Not through a process group: see `ckptman.coordination.meeting`. So nothing here is in any order with the collectives
of the training, works with every backend, and may be called from a background thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from ckptman.coordination.meeting import SILENCE_S, Meeting

_numbers = itertools.count()


class StoreBoard:
    """A board on a store of torch's."""

    longest_pause_s = 0.01

    def __init__(self, store: Store) -> None:
        self._store = store

    def put(self, key: str, value: bytes) -> None:
        """Put *value* up."""
        self._store.set(key, value)  # type: ignore[arg-type]  # bytes serve; the stub says str

    def find(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Of *keys* those that are there, with their values."""
        return {key: self._store.get(key) for key in keys if self._store.check([key])}

    def delete(self, keys: Iterable[str]) -> None:
        """Take *keys* down."""
        for key in keys:
            self._store.delete_key(key)

    def beat(self, rank: int, count: int) -> None:
        """Show that *rank* lives."""
        self._store.set(f"beat/{rank}", str(count))

    def beats(self, ranks: Sequence[int]) -> Mapping[int, int]:
        """The last count of each of *ranks*."""
        found = self.find([f"beat/{rank}" for rank in ranks])
        return {int(key.partition("/")[2]): int(count) for key, count in found.items()}


class Torch(Meeting):
    """
    The ranks of ``torch.distributed``, which must be initialised. All of them make one, in the same order.

    Args:
        silence_s: After how many seconds without a sign of life a rank is given up.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, or runs on a backend without a store (MPI).
    """

    def __init__(self, *, silence_s: float = SILENCE_S) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("torch.distributed is not initialised: call init_process_group first")
        try:
            store = dist.distributed_c10d._get_default_store()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                "this process group has no store to meet at (MPI has none): give coordinator=Files(…)"
            ) from error
        board = StoreBoard(PrefixStore(f"ckptman/{next(_numbers)}", store))
        super().__init__(board, dist.get_rank(), dist.get_world_size(), silence_s=silence_s)
