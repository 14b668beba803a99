"""What all tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from azurite import serve_azure
from google_server import serve_google
from s3_server import S3Server, serve


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors are tiny, and a process that is going to fork should have no threads."""
    torch.set_num_threads(1)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """
    A folder in memory where there is one, for tests that fork or copy a thousand times.

    What a killed process wrote survives in the kernel on every filesystem, so nothing is lost by it.
    """
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="ckptman-test-", dir=memory))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on free ports of this machine, with one bucket; it ends with the tests."""
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def azure_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an Azurite with one container, ``bucket``; it ends with the tests."""
    with serve_azure(tmp_path_factory.mktemp("azurite")) as port:
        yield port


@pytest.fixture(scope="session")
def google_port() -> Iterator[int]:
    """The port of an emulator of Google's store with one bucket, ``bucket``; it ends with the tests."""
    with serve_google() as port:
        yield port
