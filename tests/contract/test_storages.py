"""Every storage of ckptman keeps the contract."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ckptman.storage.base import Storage
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage
from ckptman.testing.contracts import StorageContract
from ckptman.testing.faults import FaultySystem, fail, short_write


class TestLocalStorage(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "not" / "yet" / "there")


class TestLocalStorageWithoutHardLinks(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "root", system=FaultySystem(fail(1, errno.EPERM, name="link", lasting=True)))

    # Promised only where there are hard links: a name that is created first and filled after is seen to grow.
    test_no_reader_sees_a_part = None


class TestLocalStorageWithShortWrites(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "root", system=FaultySystem(short_write()))


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return MemoryStorage("contract")
