"""Azurite, an emulator of Azure's blobs, for the tests; skipped by name where it is not installed."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry

# the well-known account of every emulator of Azure's storage
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def connection_to(port: int) -> str:
    """A connection string for the emulator at *port*."""
    return (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    )


@functools.cache
def client_of(pid: int, port: int, read_timeout_s: float) -> Any:
    """A client of the emulator at *port*; slow to make, so that the storages of a process share it."""
    adlfs = pytest.importorskip("adlfs", reason="needs the extra azure")
    return adlfs.AzureBlobFileSystem(
        connection_string=connection_to(port),
        read_timeout=read_timeout_s,
        skip_instance_cache=True,
        use_listings_cache=False,
    )


def azure_storage(port: int, root: str | None = None, *, read_timeout_s: float = 20) -> ObjectStorage:
    """A storage in *root*, or in a new one."""
    return ObjectStorage(
        root or f"abfs://bucket/{secrets.token_hex(6)}",
        filesystem=lambda: client_of(os.getpid(), port, read_timeout_s),
        retry=Retry(sleep=lambda seconds: None),
    )


@contextmanager
def serve_azure(folder: Path) -> Iterator[int]:
    """A new Azurite with one container, ``bucket``: its port."""
    adlfs = pytest.importorskip("adlfs", reason="needs the extra azure")
    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("needs azurite-blob: npm install -g azurite")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [azurite, "--silent", "--skipApiVersionCheck", f"--location={folder}", f"--blobPort={port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends_at = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None
            assert time.monotonic() < ends_at
            time.sleep(0.1)
        adlfs.AzureBlobFileSystem(connection_string=connection_to(port), skip_instance_cache=True).mkdir("bucket")
        yield port
    finally:
        process.kill()
        process.wait()
