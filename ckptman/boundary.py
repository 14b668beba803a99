"""
Between two steps: what all ranks agree upon before any of them may save.

A notice reaches ranks at different moments, or one of them only; and "every ten minutes" ends on each rank at another
step. A rank that saved alone would wait for the others for ever. So there are *boundaries*: calls at which all ranks
tell what they know and take the same for true. Between them nothing is asked, and nothing changes.

How many calls apart they are says rank 0, the same to all: about half a second of training, so that a notice is heard
soon and the agreement (1 ms among a few ranks, more among many) costs next to nothing. Where steps are longer than
that, each call is a boundary. Where agreeing is slow (through files), they are farther apart: it may take a fiftieth
of the time, but a notice waits 10 s at most.

**An interrupted rank** must not lose count of the calls: its boundaries would be others than theirs, and it would wait
for them while they wait for it in training. This happened when Ctrl-C, caught by the program, came between the answer
of rank 0 and the line that noted it. So a thread agrees, which Ctrl-C does not reach, and the next call takes its
answer first, as that of the call that was interrupted.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec

from ckptman.coordinator import Coordinator
from ckptman.errors import CkptmanError, SaveFailed
from ckptman.preemption import Watch

INTERVAL_S = 0.5
MAX_INTERVAL_S = 10.0
SHARE = 0.02
MAX_CALLS = 100
"""So far apart at most, where agreeing is fast: steps may become slower, and the notice should not wait for them."""

MIN_STEP_S = 0.001


class _Vote(msgspec.Struct, frozen=True):
    """What a rank knows; of rank 0 also what all go by until the next boundary."""

    step: int
    host: str
    notice: str | None
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """
    The same on all ranks.

    Attributes:
        notice: What rank was told that the job will be stopped, and how; None if none was.
        seconds: Since the last save, as of the last boundary.
    """

    notice: str | None
    seconds: float


class _Agreement:
    """What all ranks agree upon, asked for by a thread."""

    def __init__(self, agree: Callable[[], list[_Vote]]) -> None:
        self._agree = agree
        self._answer: Future[list[_Vote]] = Future()
        self._thread = threading.Thread(target=self._run, name="ckptman-agree", daemon=True)

    def result(self) -> list[_Vote]:
        """The votes. May be asked again after an interrupt."""
        if self._thread.ident is None:
            self._thread.start()
        return self._answer.result()

    def _run(self) -> None:
        try:
            self._answer.set_result(self._agree())
        except BaseException as error:  # noqa: BLE001 - a thread's edge: whoever waits raises it
            self._answer.set_exception(error)


class Boundary:
    """
    Asked once per step, on every rank. To be used by one thread.

    Args:
        coordinator: A channel for nobody else.
        watch: Looks for notices on this rank.
        clock: The monotonic clock.
    """

    def __init__(self, coordinator: Coordinator, watch: Watch, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._coordinator = coordinator
        self._watch = watch
        self._clock = clock
        self._saved_at = clock()
        self._seconds = 0.0
        self._calls = 0  # since the last boundary
        self._next = 1
        self._agreement: _Agreement | None = None  # under way, or left behind by a call that was interrupted
        self._agreed_at: float | None = None
        self._cost_s = math.inf  # the least that agreeing took: more was waiting

    def saved(self) -> None:
        """A save begins, on all ranks."""
        self._saved_at = self._clock()
        self._seconds = 0.0

    def look(self, step: int) -> Outlook:
        """
        What all ranks go by at *step*.

        Raises:
            SaveFailed: A rank was lost, or is at another step. On all ranks.
        """
        mine = self._watch.look()
        if self._coordinator.world_size == 1:
            return Outlook(notice=mine, seconds=self._clock() - self._saved_at)
        if self._agreement is not None and (told := _told(self._conclude(step))):
            return Outlook(notice=told, seconds=self._seconds)
        self._calls += 1
        if self._calls < self._next:
            return Outlook(notice=None, seconds=self._seconds)
        self._agreement = _Agreement(lambda: self._agree(step, mine))
        votes = self._conclude(step)
        if len({vote.step for vote in votes}) > 1:
            steps = ", ".join(f"rank {rank}: {vote.step}" for rank, vote in enumerate(votes))
            raise SaveFailed(f"maybe_save was called with different steps on different ranks ({steps})", step=step)
        return Outlook(notice=_told(votes), seconds=self._seconds)

    def _conclude(self, step: int) -> list[_Vote]:
        """Wait for the agreement and note what it says. Interrupted at any point, it is simply done again."""
        assert self._agreement is not None
        try:
            votes = self._agreement.result()
        except CkptmanError as error:
            self._calls, self._next, self._agreement = 0, 1, None
            raise SaveFailed(f"the ranks could not agree whether to save step {step}: {error}", step=step) from error
        self._calls, self._next, self._seconds = 0, votes[0].calls, votes[0].seconds
        self._agreement = None
        return votes

    def _agree(self, step: int, notice: str | None) -> list[_Vote]:
        began = self._clock()
        step_s = None if self._agreed_at is None else (began - self._agreed_at) / self._calls
        vote = _Vote(
            step=step,
            host=self._coordinator.host,
            notice=notice,
            seconds=began - self._saved_at,
            calls=1 if step_s is None else calls_between(step_s, self._cost_s),
        )
        votes = self._coordinator.agree(msgspec.json.encode(vote))
        self._agreed_at = self._clock()
        self._cost_s = min(self._cost_s, self._agreed_at - began)
        return [msgspec.json.decode(one, type=_Vote) for one in votes]


def _told(votes: list[_Vote]) -> str | None:
    """The first notice, and whose it is."""
    told = [f"{vote.notice} (on rank {n}, host {vote.host})" for n, vote in enumerate(votes) if vote.notice]
    return told[0] if told else None


def calls_between(step_s: float, cost_s: float) -> int:
    """How many calls apart boundaries should be, where a step takes *step_s* and agreeing *cost_s*. At least 1."""
    step_s = max(step_s, MIN_STEP_S)
    by_cost = min(MAX_INTERVAL_S, cost_s / SHARE)
    most = max(MAX_CALLS, by_cost / step_s)
    return max(1, int(min(most, max(INTERVAL_S, by_cost) / step_s)))
