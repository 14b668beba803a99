"""
Beginning a save: the live state is captured, and it is known what this process writes, and who commits it.

A process alone captures and stages while it takes the right to change the root. Many ranks do it together (`Sharing`);
rank 0 takes the right. Whatever stops a rank from beginning is told to all: they may have begun, and would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from ckptman.errors import CkptmanError, RankLost, SaveFailed, StorageError
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.pipeline.engine import Source
from ckptman.pipeline.loss import failure as failure_of
from ckptman.pipeline.ranks import Ranks
from ckptman.pipeline.saving import Job, Saved, name_attempt, write_checkpoint
from ckptman.pipeline.sharing import Attempted, Sharing
from ckptman.pipeline.together import Turn, failed
from ckptman.repository.claim import Claim
from ckptman.repository.ownership import Ownership
from ckptman.state.capture import Captured, capture


@dataclass(frozen=True, slots=True)
class Begun:
    """
    A save that may be staged.

    Attributes:
        job: The save.
        captured: What this process stages: file → its leaves.
        attempts: What it may borrow from. Waits until this process may change the root, and raises where it may not:
            to be asked before ``write`` is called.
        write: Writes and commits, from what is staged.
        abandon: For a failure of staging: tells whoever waits for ``write``. Does nothing once that was called.
    """

    job: Job
    captured: Mapping[str, Captured]
    attempts: Callable[[], Collection[str]]
    write: Callable[[Source], Saved]
    abandon: Callable[[BaseException], None]


class Starting:
    """
    Begins saves. To be used by the thread that trains, in the same order on all ranks.

    Args:
        ranks: All of them.
        claim: To the root.
        rng: Whether the global random streams belong to the state.
    """

    def __init__(self, ranks: Ranks, claim: Claim, *, rng: bool) -> None:
        self._ranks = ranks
        self._claim = claim
        self._rng = rng
        self.sharing = Sharing(ranks)

    def begin(self, job: Job, state: Mapping[str, object], failure: BaseException | None) -> Begun:
        """
        Capture *state* for *job*. Collective where the ranks are many.

        Args:
            job: The save, without what is captured.
            state: Component name → live object.
            failure: Of an earlier save, which nobody has heard of yet: it is raised instead, on all ranks.

        Raises:
            SaveFailed, Fenced, UnsupportedState: Nothing was begun.
            LockTimeout: As these, of many ranks; a process alone hears of it from ``attempts``.
        """
        if self._ranks.are_many:
            return self._begin_together(job, state, failure)
        if failure is not None:
            raise failure
        self._claim.begin()
        captured = self._capture(state)
        begun = job.having(captured)

        def attempts() -> Collection[str]:
            return {entry.attempt for entry in self._own(job.step).newest.checkpoints}

        def write(source: Source) -> Saved:
            assert self._claim.held is not None, "attempts were not asked for"
            return write_checkpoint(self._claim.held, begun, source)

        return Begun(begun, captured, attempts, write, lambda _: None)

    def tell_all(self, error: Exception) -> None:
        """This rank cannot begin a save, for *error*, and raises it: so will the others, who may be about to begin."""

        def part() -> bytes:
            raise error

        with suppress(CkptmanError):  # it is raised on the others; here it is the caller who raises it
            self._ranks.conclude(part)

    def _begin_together(self, job: Job, state: Mapping[str, object], failure: BaseException | None) -> Begun:
        def captured_here() -> Mapping[str, Captured]:
            if failure is not None:
                raise failure
            try:
                return self._capture(state)
            except Exception as error:
                raise failed(job.step, error) from error

        def named() -> Attempted:
            owner = self._own(job.step)
            attempts = [entry.attempt for entry in owner.newest.checkpoints]
            return Attempted(attempt=name_attempt(owner, job.step), after=owner.newest.number, attempts=attempts)

        try:
            captured, shared = self.sharing.begin(job.step, captured_here, named)
        except RankLost as lost:
            raise failure_of(job.step, lost) from lost
        turn = Turn(self._ranks, self._claim.storage, self._claim.held, job.having(captured), shared)
        return Begun(turn.job, shared.mine, lambda: shared.attempts, turn.write, turn.abandon)

    def _capture(self, state: Mapping[str, object]) -> Mapping[str, Captured]:
        with no_search_for_cycles():
            return capture(state, rng=self._rng)

    def _own(self, step: int) -> Ownership:
        try:
            return self._claim.owner()
        except StorageError as error:
            raise SaveFailed(f"saving step {step} failed, nothing was committed: {error}", step=step) from error
