"""
Azure and Google keep the storage contract too, as far as there is a server to ask.

Azure is asked where Azurite is installed (``npm install -g azurite``) beside the extra ``azure``. No emulator of
Google's that installs from pip or npm refuses a second create-only put, so Google itself is asked, where
``CKPTMAN_TEST_GCS`` names a place in a bucket, such as ``gs://bucket/tests``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckptman import CheckpointManager
from ckptman.storage.base import Storage
from ckptman.storage.object import ObjectStorage
from ckptman.testing.contracts import StorageContract

# the well-known account of every emulator of Azure's storage
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What adlfs wants in order to reach a new Azurite with one container, ``bucket``."""
    adlfs = pytest.importorskip("adlfs", reason="needs the extra azure")
    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("needs azurite-blob: npm install -g azurite")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("azurite")
    command = [azurite, "--silent", "--skipApiVersionCheck", f"--location={folder}", f"--blobPort={port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    )
    try:
        ends_at = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None
            assert time.monotonic() < ends_at
            time.sleep(0.1)
        adlfs.AzureBlobFileSystem(connection_string=connection, skip_instance_cache=True).mkdir("bucket")
        yield {"connection_string": connection}
    finally:
        process.kill()
        process.wait()


class TestAzure(StorageContract):
    races = 3

    @pytest.fixture
    def storage(self, azure: dict[str, object]) -> Storage:
        return ObjectStorage(f"abfs://bucket/{secrets.token_hex(6)}", storage_options=azure)


class TestGoogle(StorageContract):
    races = 3

    @pytest.fixture
    def storage(self) -> Storage:
        pytest.importorskip("gcsfs", reason="needs the extra gcs")
        place = os.environ.get("CKPTMAN_TEST_GCS")
        if not place:
            pytest.skip("needs CKPTMAN_TEST_GCS=gs://bucket/somewhere, and credentials for it")
        return ObjectStorage(f"{place.rstrip('/')}/{secrets.token_hex(6)}")


def test_a_manager_saves_to_azure_and_restores(azure: dict[str, object], tmp_path: Path) -> None:
    """Files above and below what is put at once; taken over by a second manager; nothing secret in what it says."""
    root = f"abfs://bucket/{secrets.token_hex(6)}"
    large, small = torch.rand(4 << 20), torch.rand(5)
    with CheckpointManager(root, {"large": large, "small": small}, storage_options=azure) as first:
        first.save(1, block=True)
        small.add_(1)
        first.save(2, block=True)
        expected = large.clone(), small.clone()
        with CheckpointManager(root, {"large": large, "small": small}, storage_options=azure) as second:
            large.zero_(), small.zero_()
            found = second.restore()
    assert found is not None
    assert found.step == 2
    assert torch.equal(large, expected[0])
    assert torch.equal(small, expected[1])
    assert KEY not in repr(first) + repr(found)
