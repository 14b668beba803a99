"""The border where the operating system's errors become ours: what failed, where, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ckptman.errors import StorageError
from ckptman.storage.base import KeyExists, KeyMissing, NotAFile

_HINTS = {
    errno.ENOSPC: "the disk is full: free some space, or keep fewer checkpoints",
    getattr(errno, "EDQUOT", -1): "your quota is used up: free some space, or keep fewer checkpoints",
    errno.EROFS: "this filesystem is mounted read-only",
    errno.EACCES: "this user may not do that here: check owner and mode of the folder",
    errno.EPERM: "this user may not do that here: check owner and mode of the folder",
    errno.ENOTDIR: "a file lies where a folder is needed: is the root itself a file?",
    errno.ELOOP: "a symbolic link lies there, and below the root none is followed: put the file itself there",
    errno.ENOENT: "the folder, or the whole root, is gone: was it removed meanwhile?",
    getattr(errno, "ESTALE", -2): "the server has forgotten what its handles mean: mount it again",
    errno.EIO: "the device reports a failure: look at the system's log before trusting it again",
}


@contextmanager
def reporting(doing: str, key: str, *, missing: bool = False) -> Iterator[None]:
    """
    Turn an `OSError` of the block into a `StorageError` that says what *doing* was for and what may help.

    With *missing*, the block reads *key*, so that a name that is not there is `KeyMissing`, and a link `NotAFile`.
    """
    try:
        yield
    except StorageError:
        raise
    except FileExistsError as error:
        raise KeyExists.from_os(error, doing, key) from error
    except OSError as error:
        if missing and error.errno == errno.ENOENT:
            raise KeyMissing.from_os(error, doing, key) from error
        if missing and error.errno == errno.ELOOP:
            raise NotAFile.from_os(error, hinted(doing, error), key) from error
        raise StorageError.from_os(error, hinted(doing, error), key) from error


def hinted(doing: str, error: OSError) -> str:
    """*doing*, with what may help against *error* where we know."""
    hint = _HINTS.get(error.errno or 0)
    return f"{doing} ({hint})" if hint else doing
