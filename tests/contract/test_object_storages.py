"""Object storages keep the contract: S3 on a real server, and any other filesystem of fsspec's."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from s3_server import S3Server

from ckptman.storage.base import Storage
from ckptman.storage.object import ObjectStorage
from ckptman.testing.contracts import StorageContract


class ExclusiveMemory(MemoryFileSystem):  # type: ignore[misc]
    """fsspec's own looks first and writes then, and walks for a listing; this one does each in one step of a dict."""

    protocol = "exclusive"
    cachable = False

    def __init__(self) -> None:
        super().__init__(global_store=False)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        file = MemoryFile(self, path, value)
        if mode == "create" and self.store.setdefault(path, file) is not file:
            raise FileExistsError(path)
        self.store[path] = file

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        return bytes(self.store[path].getbuffer()[start:end])

    def find(self, path: str, **kwargs: object) -> Mapping[str, Mapping[str, int]]:
        return {key: {"size": file.size} for key, file in list(self.store.items()) if key.startswith(f"{path}/")}


class TestS3(StorageContract):
    races = 3  # SeaweedFS lets those who wait for one key sleep for seconds

    @pytest.fixture
    def storage(self, s3_server: S3Server) -> Storage:
        return s3_server.storage()


class TestAnyFilesystem(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return ObjectStorage("memory://contract", filesystem=ExclusiveMemory)
