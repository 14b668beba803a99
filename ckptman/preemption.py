"""
Preemption notices: SIGTERM and SIGUSR1 set a flag, and nothing is ever saved inside a signal handler.

The training loop looks at the flag between two steps (``maybe_save``), where the state is whole.

A handler that nobody listens to any more must not swallow the signal. There are three ways to come to that: it was
inherited by a forked child (a DataLoader worker that is to be terminated), its manager was closed while another
handler stood on top of it, or its manager was dropped. In each the signal does what it did before us.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


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
