"""The accident: the process is killed in the middle of a save, at a place that leaves as little as possible intact."""

from __future__ import annotations

import os
import signal
from io import FileIO
from pathlib import PurePath

from ckptman.format.names import Attempt
from ckptman.storage.system import System


class KillingSystem(System):
    """
    The real system, until the root's first writer is about to make the second data file of *step* durable.

    Then this very process is killed, as by ``kill -9``: the first file is whole, the second one is written but perhaps
    not on the disk, the others, the manifest and the commit are missing. No ``finally`` and no ``atexit`` runs.
    (Windows has no such signal; there the process is terminated, which comes to the same.) The next writer is spared,
    so that the same command, run again, comes through.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._files = 0

    def fsync(self, file: FileIO) -> None:
        """Make *file* durable, or die."""
        if self._belongs_to_the_save(PurePath(str(file.name))):
            self._files += 1
            if self._files == 2:
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        super().fsync(file)

    def _belongs_to_the_save(self, path: PurePath) -> bool:
        attempt = Attempt.parse(path.parent.name)
        is_ours = attempt is not None and (attempt.step, attempt.epoch) == (self._step, 1)
        return is_ours and path.suffix == ".safetensors"
