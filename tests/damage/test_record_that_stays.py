"""A record that could be made neither durable nor undone, where there are no hard links."""

from __future__ import annotations

import errno
from io import FileIO
from pathlib import Path

import pytest

from ckptman.errors import CommitUnknown
from ckptman.format.names import record_key
from ckptman.repository.ownership import take
from ckptman.storage.local import LocalStorage
from ckptman.storage.system import System

RECORD = record_key(2)


class Stuck(System):
    """No hard links; and the second record can be neither fsynced nor unlinked."""

    def link(self, source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no hard links")

    def fsync(self, file: FileIO) -> None:
        if str(file.name).endswith(RECORD):
            raise OSError(errno.EIO, "the device fails")
        super().fsync(file)

    def unlink(self, path: str) -> None:
        if path.endswith(RECORD):
            raise OSError(errno.EIO, "the device fails")
        super().unlink(path)


def test_a_record_whose_fsync_failed_is_never_acknowledged(tmp_path: Path) -> None:
    """Reading it back finds our nonce, and proves nothing: the kernel may have dropped its pages already."""
    owner = take(LocalStorage(tmp_path, system=Stuck()), timeout_s=0)
    with pytest.raises(CommitUnknown, match="durable"):
        owner.commit(tuple, "a change")
    assert (tmp_path / RECORD).exists()
    owner.release()
