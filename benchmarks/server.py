"""One S3 server on this machine for all contestants: SeaweedFS, started as the tests start it."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TESTS = str(Path(__file__).parents[1] / "tests")
_FILE = "server.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where it listens, and what it lets in."""

    endpoint: str
    access: str
    secret: str

    @property
    def storage_options(self) -> dict[str, object]:
        """As fsspec's driver wants them."""
        return {"key": self.access, "secret": self.secret, "endpoint_url": self.endpoint}

    def client(self, **config: object) -> Any:
        """A plain client of botocore's, which sends nothing twice."""
        from botocore.config import Config
        from botocore.session import Session

        return Session().create_client("s3", config=Config(**config), **self.client_arguments)

    @property
    def client_arguments(self) -> dict[str, str]:
        """As botocore wants them."""
        return {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": self.access,
            "aws_secret_access_key": self.secret,
            "region_name": "us-east-1",
        }


@contextmanager
def serving(folder: Path) -> Iterator[None]:
    """A server until the block ends, which `server_of` a place in *folder* finds."""
    data = folder / "server"
    data.mkdir(parents=True)
    with _tests().serve(data) as server:
        announce(server.port, folder)
        yield


def announce(port: int, folder: Path) -> None:
    """Let places in *folder* find the tests' server at *port*."""
    tests = _tests()
    facts = {"endpoint": f"http://127.0.0.1:{port}", "access": tests.ACCESS, "secret": tests.SECRET}
    (folder / _FILE).write_text(json.dumps(facts))


def _tests() -> Any:
    if _TESTS not in sys.path:
        sys.path.append(_TESTS)
    import s3_server

    return s3_server


def server_of(place: Path) -> Server:
    """The server that runs beside the measurement in the folder *place*."""
    return Server(**json.loads((place.parent / _FILE).read_text()))


@contextmanager
def bucket_of(server: Server) -> Iterator[str]:
    """A bucket of one's own until the block ends: deleted whole, it gives the disk's room back at once."""
    client, name = server.client(), f"bench-{secrets.token_hex(4)}"
    client.create_bucket(Bucket=name)
    try:
        yield name
    finally:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            for found in page.get("Contents", ()):
                client.delete_object(Bucket=name, Key=found["Key"])
        client.delete_bucket(Bucket=name)
        client.close()
