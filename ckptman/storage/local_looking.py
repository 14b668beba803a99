"""
Looking again, where a network filesystem may have answered from memory.

An NFS client remembers that a name was not there, and goes on saying so for half a minute after another client has
made it; listing the folder makes it ask the server. So a name that is not found is looked for in its folder's listing
before anybody is told that it is missing, and asked for again if it is there. The same goes for the folders above.

``ESTALE`` says that the file or folder that was opened is gone from the server, or that the server has forgotten what
its handles mean. The listing tells which: what is not listed any more is missing; what is, is asked for once more, and
if that fails too, it is a failure of the medium, and not a file that is missing.

On a local disk none of this happens, but for the listing that confirms a missing name.
"""

# Paths are text here: one string goes to the system as it is.

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from ckptman.storage.system import System

Result = TypeVar("Result")

STALE = getattr(errno, "ESTALE", errno.ENOENT)
_MAY_NOT_LOOK = frozenset({errno.EACCES, errno.EPERM})


class LocalLooking:
    """Raises the system's own errors. Safe to use from several threads."""

    def __init__(self, *, system: System) -> None:
        self._system = system

    def certain(self, path: str, look: Callable[[], Result], *, refuse: Callable[[], object]) -> Result:
        """
        What *look* says of *path*, after the client was made to ask the server if that may be stale.

        *refuse* is called before the second look, for what was looked at before the first: it may have been stale too.

        Raises:
            FileNotFoundError: *path* is not there, as far as its folder may be listed.
            OSError: Whatever else *look* raises; ``ESTALE`` only if it says so twice.
        """
        try:
            return look()
        except OSError as error:
            if error.errno not in (errno.ENOENT, STALE):
                raise
            is_listed = self._is_listed(path)
            if is_listed is False or (is_listed is None and error.errno == errno.ENOENT):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        refuse()
        return look()

    def _is_listed(self, path: str) -> bool | None:
        """Whether *path* is in the listing of its folder; None if that may not be listed."""
        parent, name = os.path.split(path)
        if not name:
            return True
        try:
            try:
                return name in self._names(parent)
            except OSError as error:
                if error.errno not in (errno.ENOENT, STALE):
                    raise
            if not (is_listed := self._is_listed(parent)):
                return is_listed
            return name in self._names(parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno in _MAY_NOT_LOOK:
                return None
            raise

    def _names(self, path: str) -> set[str]:
        return {entry.name for entry in self._system.scan(path)}
