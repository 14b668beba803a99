"""What is told where the writer's lock cannot be taken."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ckptman.errors import StorageError
from ckptman.repository.file_lock import RootLock


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.EROFS, "mounted read-only"), (errno.ENOSPC, "the disk is full"), (errno.ENOLCK, "working file locks")],
    ids=["read-only", "full", "no locks"],
)
def test_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    """A filesystem that is read-only or full is called that; only one that cannot lock is blamed for its locks."""
    path = tmp_path / "writer.lock"
    real = os.open

    def refuse(name: str, *rest: int, **more: int) -> int:
        if Path(name) == path:
            raise OSError(number, os.strerror(number), name)
        return real(name, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=says) as caught:
        RootLock(path).acquire(0)
    assert caught.value.errno == number
    assert ("working file locks" in str(caught.value)) == (number == errno.ENOLCK)
