"""
moto, an imitation of S3 within this process: quick, and with what SeaweedFS has not (policies, pages of any size).

It honours ``If-None-Match`` and ``If-Match``, also on completing an upload. It believes every signature and every
checksum, so what those refuse is tested on SeaweedFS.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
import fsspec
from moto.server import ThreadedMotoServer

from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry


@dataclass(frozen=True, slots=True, kw_only=True)
class Moto:
    """A server, and a client of it that is not ours."""

    options: dict[str, object]
    client: Any
    _clients: dict[str, Any] = field(default_factory=dict)

    def new_bucket(self) -> str:
        name = f"bucket-{secrets.token_hex(6)}"
        self.client.create_bucket(Bucket=name)
        return name

    def storage(self, bucket: str, root: str = "runs/a", **more: object) -> ObjectStorage:
        """A storage; with the same options *more*, all share one client, which is slow to make."""
        key = json.dumps(more)
        if key not in self._clients:
            self._clients[key] = fsspec.filesystem("s3", skip_instance_cache=True, **self.options, **more)
        retry = Retry(sleep=lambda seconds: None)
        return ObjectStorage(f"s3://{bucket}/{root}", filesystem=lambda: self._clients[key], retry=retry)

    def deny(self, bucket: str, action: str, resource: str) -> None:
        """Let nobody do *action* to ``bucket/resource``."""
        rule = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": f"s3:{action}",
            "Resource": f"arn:aws:s3:::{bucket}{resource}",
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
        self.client.put_bucket_policy(Bucket=bucket, Policy=policy)


@contextmanager
def imitate() -> Iterator[Moto]:
    """The server, until the block ends."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="x", aws_secret_access_key="y", region_name="us-east-1"
    )
    try:
        yield Moto(
            options={
                "key": "x",
                "secret": "canary-of-moto",
                "endpoint_url": url,
                "use_listings_cache": False,
                "config_kwargs": {"retries": {"total_max_attempts": 1}},
            },
            client=client,
        )
    finally:
        server.stop()
