"""
Preemption notices: a signal, a file that appears, a deadline that comes near.

A signal sets a flag, and nothing is ever saved inside a signal handler: the training loop looks between two steps
(``maybe_save``), where the state is whole.

A handler that nobody listens to any more must not swallow the signal. There are three ways to come to that: it was
inherited by a forked child (a DataLoader worker that is to be terminated), its manager was closed while another
handler stood on top of it, or its manager was dropped. In each the signal does what it did before us.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType

_log = logging.getLogger("ckptman")

FILE_LOOK_S = 1.0
"""How often the folder of the file is listed."""

SAVES_AHEAD = 2.0
"""So many of the longest save so far are left before a deadline, and as many of the longest step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preemption:
    """
    How this job learns that it will be stopped, and how long it then has. SIGTERM and SIGUSR1 are always heard.

    Args:
        file: A path; that it appears, or is written anew, is a notice. It may be local to one node. What lies there
            already when the manager is made is what the last notice left, and none. Its folder is listed once a second.
        deadline: When the job will be killed: seconds since 1970, or a datetime with a time zone. It is a notice when
            so little time is left that the save must begin. None: ``SLURM_JOB_END_TIME`` of the environment, where
            there is one that is not over (then the job was given more time); ``math.inf``: there is no deadline,
            whatever the environment says.
        grace_s: How long the job lives on after a signal or the file, and the least that is left before a deadline.
            (Kubernetes and torchrun give 30 s, SLURM what ``--signal`` says.) A save that takes longer is warned about.

    Raises:
        ValueError: A number makes no sense, or a datetime has no time zone.
    """

    file: str | os.PathLike[str] | None = None
    deadline: float | datetime | None = None
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if not (self.grace_s >= 0 and math.isfinite(self.grace_s)):
            raise ValueError(f"grace_s must be 0 or more seconds, got {self.grace_s!r}")
        if isinstance(self.deadline, datetime) and self.deadline.tzinfo is None:
            raise ValueError(f"the deadline {self.deadline} needs a time zone, such as tzinfo=datetime.UTC")
        if isinstance(self.deadline, float) and math.isnan(self.deadline):
            raise ValueError("the deadline must be seconds since 1970, got nan")

    def ends_at(self, environ: Mapping[str, str]) -> float:
        """The deadline in seconds since 1970; infinite where there is none."""
        if self.deadline is None:
            return _slurm_end(environ)
        return self.deadline.timestamp() if isinstance(self.deadline, datetime) else float(self.deadline)


def _slurm_end(environ: Mapping[str, str]) -> float:
    text = environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() else math.inf


class Watch:
    """
    Looks for notices of all three kinds on this rank. Cheap enough for every step.

    Args:
        preemption: What to look for.
        environ: Where a scheduler says its deadline.
        now: The time since 1970.
        clock: The monotonic clock.
    """

    def __init__(
        self,
        preemption: Preemption,
        *,
        environ: Mapping[str, str] = os.environ,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.signals = Notices()
        self._file = None if preemption.file is None else Path(preemption.file)
        self._grace_s = preemption.grace_s
        self._ends_at = preemption.ends_at(environ)
        if preemption.deadline is None and self._ends_at <= now():
            _log.warning(
                "SLURM_JOB_END_TIME is over, and the job still runs: it was given more time. No deadline is known"
            )
            self._ends_at = math.inf
        self._now = now
        self._clock = clock
        self._leftover = self._file_identity()
        self._file_looked_at = clock()
        self._looked_at: float | None = None
        self._longest_step_s = 0.0
        self._longest_save_s = 0.0  # written by the thread that saves
        self._noticed: str | None = None
        self._noticed_at = 0.0
        self._has_warned = False

    def look(self) -> str | None:
        """What this rank was told, by now; None if nothing. To be called between steps."""
        self._measure_step()
        if self._noticed is None:
            self._noticed = self.signals.received or self._file_notice() or self._deadline_notice()
            self._noticed_at = self._clock()
        return self._noticed

    def took(self, save_s: float) -> None:
        """A save took so long, from its call to its commit."""
        self._longest_save_s = max(self._longest_save_s, save_s)
        if save_s > self._grace_s and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "a save took %.0f s, and a preemption notice leaves %.0f s (Preemption.grace_s): a checkpoint that is "
                "begun after a notice may not be committed in time. Save more often, or have more notice",
                save_s,
                self._grace_s,
            )

    @property
    def has_noticed(self) -> bool:
        """Whether the job is about to be stopped, as far as this rank knows."""
        return self.signals.received is not None or self._noticed is not None

    def hear(self, notice: str) -> None:
        """The job is about to be stopped, as some rank was told. Say so if the save will hardly be done in time."""
        if self._noticed is None:
            self._noticed, self._noticed_at = notice, self._clock()
        left_s = min(self._ends_at - self._now(), self._grace_s - (self._clock() - self._noticed_at))
        if self._longest_save_s > left_s:
            _log.warning(
                "a save took up to %.0f s here, and about %.0f s are left: the last checkpoint may not be committed",
                self._longest_save_s,
                max(0.0, left_s),
            )

    def _measure_step(self) -> None:
        now = self._clock()
        if self._looked_at is not None:
            self._longest_step_s = max(self._longest_step_s, now - self._looked_at)
        self._looked_at = now

    def _file_notice(self) -> str | None:
        if self._file is None or self._clock() - self._file_looked_at < FILE_LOOK_S:
            return None
        self._file_looked_at = self._clock()
        identity = self._file_identity()
        return f"the file {self._file}" if identity is not None and identity != self._leftover else None

    def _file_identity(self) -> tuple[int, int] | None:
        """Which file lies there. Found by listing: NFS remembers for half a minute that a name was not there."""
        if self._file is None:
            return None
        try:
            if self._file.name not in os.listdir(self._file.parent):  # noqa: PTH208 - names are enough
                return None
            found = self._file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _deadline_notice(self) -> str | None:
        left_s = self._ends_at - self._now()
        needed_s = SAVES_AHEAD * (self._longest_save_s + self._longest_step_s)
        return f"the deadline in {left_s:.0f} s" if left_s <= max(self._grace_s, needed_s) else None


class Notices:
    """
    Listens for the signals that announce the end.

    A handler that was there before is called too; the default action (to die) is what a notice replaces.
    """

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, object] = {}
        self._pid: int | None = None  # of the process that listens; None: nobody does
        self.received: str | None = None

    def install(self) -> None:
        """Install the handlers; does nothing off the main thread (Python forbids it there) or the second time."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        for name in ("SIGTERM", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None:
                self._previous[number] = signal.getsignal(number)
                signal.signal(number, self._notice)

    def uninstall(self) -> None:
        """Stop listening, on any thread; on the main one put back what was there, unless we are below another's."""
        self._pid = None
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in list(self._previous.items()):
            if signal.getsignal(number) == self._notice:
                signal.signal(number, previous)  # type: ignore[arg-type]  # exactly what getsignal gave us
                del self._previous[number]

    def _notice(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(signal.Signals(number), signal.SIG_DFL)
        if self._pid == os.getpid():
            self.received = signal.Signals(number).name
        elif previous is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if callable(previous):
            previous(number, frame)
