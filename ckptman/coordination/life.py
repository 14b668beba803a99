"""
Who is alive: every rank beats, and whoever waits for a rank listens.

Each rank pins a rising count every few seconds, from a thread of its own, so that a rank that computes or writes for
an hour is heard all the while. A rank is silent when *the one who waits for it* has seen no new count for `SILENCE_S`
by its own clock: no two clocks are compared. A listener that did not look for a while (it was busy, or was itself
stopped) begins to count anew, so that nobody is called silent for the time in which nobody listened.

What this does not tell: whether a rank that beats will ever come. For that there is a patience, in `hub`.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from ckptman.coordination.board import Board
from ckptman.errors import StorageError

_log = logging.getLogger("ckptman")

SILENCE_S = 15.0
"""How long a rank may be silent. With the beats and the looks between, a dead one is named within 20 s."""

SILENCE_OF_FILES_S = 18.0
"""The same where beats are files, which are made and listed: named within 22 s."""

HURRIED_BEATS = 3
"""How many beats a rank may miss before one that is in a hurry calls it silent."""

LOOK_S = 1.0
"""How often a rank that waits looks whether the others live."""


@dataclass(slots=True)
class _Heard:
    count: int
    at: float  # when the count was first seen, or when somebody began to listen again


class Life:
    """
    This rank's beat, and its ear for the others. `start` begins the thread, `stop` joins it.

    Safe to use from several threads.
    """

    def __init__(self, board: Board, rank: int, *, silence_s: float = SILENCE_S) -> None:
        self._board = board  # the thread's own
        self._ear = board.connect()
        self._rank = rank
        self._silence_s = silence_s
        self._beat_s = min(board.beat_s, silence_s / 5)
        self._lock = threading.Lock()  # guards the ear and the three below
        self._heard: dict[int, _Heard] = {}
        self._silent: dict[int, int] = {}  # rank → the count after which it was found silent
        self._looked_at: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ckptman-beat", daemon=True)

    def start(self) -> None:
        """Beat once, so that everybody may hear of this rank, and go on in the background. Raises StorageError."""
        self._board.beat(self._rank, 0)
        self._thread.start()
        atexit.register(self.stop)  # a thread that is inside torch while the interpreter ends may crash it

    def stop(self) -> None:
        """Stop beating. Again: does nothing."""
        atexit.unregister(self.stop)
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._board.close()
        self._ear.close()

    def hurry(self) -> None:
        """Call a rank silent sooner from now on, also while somebody waits."""
        with self._lock:
            self._silence_s = min(self._silence_s, HURRIED_BEATS * self._beat_s)

    def _beat(self) -> None:
        count, has_failed = 0, False
        while not self._over.wait(self._beat_s):
            count += 1
            try:
                self._board.beat(self._rank, count)
                has_failed = False
            except StorageError as error:  # those who wait for us judge by what they see; the next beat may pass
                if not has_failed:
                    _log.warning("rank %d cannot tell the others that it is alive: %s", self._rank, error)
                has_failed = True

    def silent(self, ranks: Iterable[int]) -> dict[int, float]:
        """
        Those of *ranks* that are silent, with the seconds since they were last heard of.

        To be asked about every `LOOK_S` while waiting. A rank that was never heard of is not silent: it may be on its
        way. Raises StorageError.
        """
        with self._lock:
            asked = list(ranks)
            counts = self._ear.beats(asked)
            now = time.monotonic()
            found = {rank: self._silence(rank, counts[rank], now) for rank in asked if rank in counts}
            return {rank: since for rank, since in found.items() if since >= self._silence_s}

    def _silence(self, rank: int, count: int, now: float) -> float:
        heard = self._heard.get(rank)
        looked_at = self._looked_at.get(rank, now)
        self._looked_at[rank] = now
        if heard is None or heard.count != count:
            self._silent.pop(rank, None)
            self._heard[rank] = heard = _Heard(count, now)
        elif self._silent.get(rank) != count and now - looked_at > 5 * LOOK_S:
            heard.at = now
        since = now - heard.at
        if since >= self._silence_s:
            self._silent[rank] = count  # dead ranks stay dead without being listened to again
        return since
