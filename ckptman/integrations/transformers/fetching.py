"""
Batches that are drawn with random numbers (masks, augmentation), the same ones after a resume in mid-epoch.

accelerate fetches a batch ahead: a checkpoint after batch 4 has random streams from which batch 6 will be drawn, and
batch 5 is drawn already, from what the streams were before. So that is kept too, and a resumed run draws batch 5 from
the one and batch 6 from the other.

Only where this process fetches. *Not* seen are worker processes, each of which has streams that every batch moves on,
and iterable data sets, of which the Trainer draws all batches again that it skips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ckptman.integrations.transformers.parts import plain_streams, put_back_streams
from ckptman.state.rng import GlobalStreams, snapshot


class Fetches:
    """
    The random streams before each batch of the epochs of one loader.

    Attributes:
        has_continued: Whether the streams of the checkpoint were put back in this epoch: at the batch that an
            uninterrupted run would have drawn next.
    """

    def __init__(self) -> None:
        self._fetched = 0
        self._taken = 0
        self._before: GlobalStreams | None = None
        self._skipped = 0
        self._resumed: dict[str, Any] | None = None
        self.has_continued = False

    def begin(self, skipped: int, resumed: dict[str, Any] | None) -> None:
        """Begin an epoch without its first *skipped* batches, as the rank that saved *resumed* would go on, if any."""
        self._fetched = 0
        self._taken = self._skipped = skipped
        self._resumed = resumed
        self.has_continued = False

    def take(self, count: int) -> None:
        """The Trainer has got *count* batches."""
        self._taken += count

    def ahead(self) -> dict[str, Any] | None:
        """The streams before a batch that is fetched and not yet trained on; None if there is none."""
        is_ahead = self._fetched > self._taken and self._before is not None
        return plain_streams(self._before) if is_ahead and self._before is not None else None

    def before_batch(self) -> None:
        """The indices of the next batch are known; its examples will now be drawn, unless it is skipped."""
        if self._fetched >= self._skipped:
            self._put_back()
            self._before = snapshot()
        self._fetched += 1

    def _put_back(self) -> None:
        if self._resumed is None:
            return
        ahead = self._resumed["ahead"]
        if ahead is not None and self._fetched == self._skipped:
            put_back_streams({"rng": ahead})
            return
        put_back_streams(self._resumed)
        self._resumed = None
        self.has_continued = True


class _Watched(BatchSampler):
    """A batch sampler that says when a batch is about to be fetched. In all else it is *sampler*."""

    def __init__(self, sampler: Any, tell: Callable[[], None]) -> None:
        self._watched = sampler
        self._tell = tell

    def __iter__(self) -> Iterator[Any]:
        for indices in self._watched:
            self._tell()
            yield indices

    def __len__(self) -> int:
        return len(self._watched)

    def __getattr__(self, name: str) -> Any:
        if name == "_watched":
            raise AttributeError(name)
        return getattr(self._watched, name)


def watch(loader: Any, tell: Callable[[], None]) -> bool:
    """
    Have *tell* called before each batch that *loader* fetches in this process.

    Returns:
        Whether it does: not where workers fetch, the data set is iterable, or the loader has a state of its own.
    """
    inner = getattr(loader, "base_dataloader", loader)
    if not isinstance(inner, DataLoader) or inner.num_workers or isinstance(inner.dataset, IterableDataset):
        return False
    sampler = inner.batch_sampler
    if sampler is None or hasattr(inner, "state_dict"):
        return False
    if isinstance(sampler, _Watched):
        sampler = sampler._watched
    object.__setattr__(inner, "batch_sampler", _Watched(sampler, tell))  # which a DataLoader itself refuses
    return True
