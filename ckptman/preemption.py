"""
Preemption notices: SIGTERM and SIGUSR1 set a flag, and nothing is ever saved inside a signal handler.

The training loop looks at the flag between two steps (``maybe_save``), where the state is whole.
"""

from __future__ import annotations

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
        self.received: str | None = None

    def install(self) -> None:
        """Install the handlers; does nothing off the main thread (Python forbids it there) or the second time."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGTERM", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None:
                self._previous[number] = signal.getsignal(number)
                signal.signal(number, self._notice)

    def uninstall(self) -> None:
        """Put back what was there, unless somebody replaced our handler since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._notice:
                signal.signal(number, previous)  # type: ignore[arg-type]  # exactly what getsignal gave us
        self._previous.clear()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        previous = self._previous.get(signal.Signals(number))
        if callable(previous):
            previous(number, frame)
