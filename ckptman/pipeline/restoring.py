"""
Restoring: the checkpoint that is wanted, loaded into the live state; and what is known of a state half restored.

Which checkpoint it is, and what it falls back to, is agreed in `ckptman.pipeline.recall`; here one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from ckptman.errors import SaveFailed
from ckptman.events import Damaged, Event
from ckptman.format.catalog import Entry
from ckptman.format.manifest import Manifest
from ckptman.pipeline.ahead import reading_ahead
from ckptman.pipeline.borrowing import Borrowing
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.pipeline.ranks import Ranks
from ckptman.pipeline.recall import recall
from ckptman.pipeline.spreading import fill_together
from ckptman.repository.repository import Repository, Which, warn_passed_over
from ckptman.repository.roots import Roots
from ckptman.state.restore import Restoration, prepare
from ckptman.types import Checkpoint, Skipped


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be restored, as `CheckpointManager.restore` takes it."""

    which: Which
    only: Collection[str] | None
    strict: bool


class Restoring:
    """
    Restores, and remembers a live state that was left half restored. To be used in the same order on all ranks.

    Args:
        ranks: All of them.
        roots: Where checkpoints are.
        borrowing: Told what the live state now has in common with a checkpoint of the root.
        emit: Told of each checkpoint that is passed over.
        rng: Whether the global random streams belong to the state.
        threads: That read at the same time.

    Attributes:
        half_restored: Why the live state may be a mixture of two; None where it is not.
    """

    def __init__(
        self,
        ranks: Ranks,
        roots: Roots,
        borrowing: Borrowing,
        emit: Callable[[Event], None],
        *,
        rng: bool,
        threads: int,
    ) -> None:
        self._ranks = ranks
        self._roots = roots
        self._borrowing = borrowing
        self._emit = emit
        self._rng = rng
        self._threads = threads
        self.half_restored: str | None = None

    def restore(self, state: Mapping[str, object], wanted: Wanted) -> Checkpoint | None:
        """Load what is *wanted* into *state*. Collective. Returns, raises and promises what the manager's does."""

        def load(repository: Repository, entry: Entry, manifest: Manifest, ranks_here: int) -> Checkpoint:
            return self._load(state, wanted, repository, entry, manifest, ranks_here)

        checkpoint, skipped = recall(self._ranks, self._roots, wanted.which, load=load, pass_over=self._pass_over)
        return None if checkpoint is None else replace(checkpoint, skipped=skipped)

    def check_not_half(self) -> None:
        """Raises SaveFailed where the live state is half restored: what would be saved was never trained."""
        if self.half_restored is not None:
            raise SaveFailed(
                f"the live state is half restored ({self.half_restored}): saving it would make the mixture permanent. "
                "Restore an intact checkpoint, or build the objects and the manager anew"
            )

    def _pass_over(self, step: int, reason: str) -> Skipped:
        root = self._roots.root.storage.url
        warn_passed_over(step, root, reason)
        self._emit(Damaged(root=root, step=step, reason=reason))
        return Skipped(step=step, reason=reason)

    def _load(
        self,
        state: Mapping[str, object],
        wanted: Wanted,
        repository: Repository,
        entry: Entry,
        manifest: Manifest,
        ranks_here: int,
    ) -> Checkpoint:
        """Load *entry*, on all ranks: each of the three steps is begun once all have done the one before."""
        ranks = self._ranks
        found: list[Restoration] = []
        values: list[dict[str, object]] = []

        with nullcontext() if ranks.are_many else reading_ahead(repository.storage, manifest, wanted.only):
            ranks.do(lambda: found.append(self._compared(state, wanted, manifest)))
        restoration = found[0]
        with self._half_restoring(entry, restoration):
            fill_together(
                ranks,
                repository.storage,
                manifest,
                restoration.targets,
                threads=self._threads,
                ranks_here=ranks_here,
            )
            ranks.do(lambda: values.append(restoration.finish()))
        if repository is self._roots.root:  # the files of a mirror cannot be pointed at from here
            self._borrowing.restored(manifest, restoration.targets.keys())
        return replace(repository.checkpoint(entry), values=values[0])

    @no_search_for_cycles()
    def _compared(self, state: Mapping[str, object], wanted: Wanted, manifest: Manifest) -> Restoration:
        return prepare(
            state,
            manifest,
            only=wanted.only,
            strict=wanted.strict,
            rng=self._rng,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
        )

    @contextmanager
    def _half_restoring(self, entry: Entry, restoration: Restoration) -> Iterator[None]:
        before, self.half_restored = self.half_restored, f"restoring step {entry.step} was interrupted"
        try:
            yield
        except Exception as error:
            self.half_restored = f"restoring step {entry.step} failed: {error}"
            raise
        # one that restored only a part leaves the rest as it was, mixture or not
        self.half_restored = None if restoration.is_complete else before
