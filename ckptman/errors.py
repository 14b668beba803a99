"""
Everything that can go wrong, as one tree, grouped by what a handler would do.

    CkptmanError
    ├── CheckpointNotFound  (LookupError)   no such step, tag or metric                        exit 3
    ├── IntegrityError                      bytes differ from their digest                     exit 4
    ├── FormatError         (ValueError)    not a ckptman root, or written by a newer version  exit 4
    ├── StateMismatch       (ValueError)    checkpoint and live state disagree                 exit 1
    ├── UnsupportedState    (TypeError)     cannot be saved without pickle                     exit 1
    ├── SaveFailed                          nothing was committed; __cause__ says why          exit 1
    ├── CommitUnknown                       the storage did not say whether a commit landed    exit 1
    ├── LockError
    │   ├── LockTimeout     (TimeoutError)  another writer is alive                            exit 5
    │   └── Fenced                          another writer took this root over                 exit 5
    ├── StorageError        (OSError)       the medium failed (full, refused, unreachable)     exit 1
    ├── RankLost                            a rank of the job is gone, or gave up               exit 1
    └── Preempted           (SystemExit)    saved after a preemption notice                    exit 75

Every error says what, where, expected and found, and what to do next. What a program may want to
act on is an attribute too, and all of it survives pickling (a rank's error travels to the others).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Self

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def redact(text: str) -> str:
    """Replace ``user:secret@`` in every URL of *text*, so that no error or log line carries one."""
    return _CREDENTIALS.sub("***@", text)


class CkptmanError(Exception):
    """The root of the tree. ``exit_code`` is what the command line exits with."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))

    def __reduce__(self) -> tuple[object, ...]:
        # errno and code live in OSError's and SystemExit's own slots, not in __dict__
        slots = {name: getattr(self, name) for name in ("errno", "code") if hasattr(self, name)}
        return _rebuild, (type(self), str(self), {**self.__dict__, **slots})

    def __str__(self) -> str:
        return str(self.args[0])


def _rebuild(cls: type[CkptmanError], message: str, facts: Mapping[str, object]) -> CkptmanError:
    error = cls.__new__(cls, message)
    CkptmanError.__init__(error, message)
    for name, value in facts.items():
        setattr(error, name, value)
    return error


class CheckpointNotFound(CkptmanError, LookupError):
    """No checkpoint has the step, tag or metric that was asked for."""

    exit_code = 3


class IntegrityError(CkptmanError):
    """
    Bytes differ from their digest, or a file is missing, too short or too long.

    Attributes:
        step: The damaged checkpoint's step; None where a catalog record is damaged.
        file: The key of the damaged file, relative to the root.
        tensor: The first tensor whose bytes are affected; None where none is (a manifest, a header).
    """

    exit_code = 4

    def __init__(
        self, message: str, *, step: int | None = None, file: str | None = None, tensor: str | None = None
    ) -> None:
        super().__init__(message)
        self.step = step
        self.file = file
        self.tensor = tensor


class FormatError(CkptmanError, ValueError):
    """Not a ckptman root, written by a newer version, or a document that breaks the format's rules."""

    exit_code = 4


class StateMismatch(CkptmanError, ValueError):
    """
    The checkpoint and the live state disagree. Raised before any live object is touched.

    Attributes:
        differences: Every disagreement, one sentence each.
    """

    def __init__(self, message: str, *, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class UnsupportedState(CkptmanError, TypeError):
    """
    A value cannot be saved without pickle. Raised before anything is written.

    Attributes:
        path: Where the value is in the state, such as ``loader.sampler['rng']``.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class SaveFailed(CkptmanError):
    """
    A save came to nothing: no checkpoint exists under this attempt. ``__cause__`` says why.

    Attributes:
        step: The step that was to be saved.
    """

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class CommitUnknown(CkptmanError):
    """The storage failed and would not say whether the commit landed. Read the catalog before deciding anything."""


class LockError(CkptmanError):
    """Another writer has this root."""

    exit_code = 5


class LockTimeout(LockError, TimeoutError):
    """
    Another writer is alive and did not go away in time.

    Attributes:
        host, pid: Where the holder runs, as far as the catalog knows; None where it has not written yet.
    """

    def __init__(self, message: str, *, host: str | None = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.host = host
        self.pid = pid


class Fenced(LockError):
    """Another writer took this root over. Nothing that raised this was committed."""


class StorageError(CkptmanError, OSError):
    """
    The medium failed: full, refused, unreachable. ``errno`` is the system's where there is one.

    Attributes:
        key: The key, relative to the root, that was being worked on.
        may_take_effect: Whether a server was asked and did not say: it may still do it, even much later.
    """

    def __init__(self, message: str, *, errno: int | None = None, key: str = "") -> None:
        super().__init__(message)
        self.errno = errno
        self.key = key
        self.may_take_effect = False

    @classmethod
    def from_os(cls, error: OSError, doing: str, key: str = "") -> Self:
        """Ours for *error*, met while *doing* something to *key*."""
        return cls(f"{doing}: {error.strerror or error}", errno=error.errno, key=key)


class RankLost(CkptmanError):
    """
    A rank of the job died, fell silent, left or gave up, so that what all do together cannot be done.

    A save that fails for it raises `SaveFailed`, with this as the cause.

    Attributes:
        ranks: Which ones.
        hosts: Where each of them runs, as far as it is known.
        waited_s: How long they had been waited for.
    """

    def __init__(
        self, message: str, *, ranks: Sequence[int] = (), hosts: Sequence[str] = (), waited_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.hosts = tuple(hosts)
        self.waited_s = waited_s


class Preempted(CkptmanError, SystemExit):
    """
    A checkpoint was committed after a preemption notice; the process should now exit, with code 75.

    Attributes:
        step: The step of the committed checkpoint.
    """

    exit_code = 75

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.code = self.exit_code
