"""
Those who save to and load from S3: plain clients, which are the floor, then ckptman and its rivals.

Each is used as its own documentation says, with the same server, bucket and credentials. Plain clients send the bytes
of the state as one object in parts, from memory to memory, with nothing around it: no file format, no copy of tensors,
no digests but those that the client adds to every request by itself.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Protocol

import torch

from benchmarks import system
from benchmarks.server import Server
from benchmarks.states import State

MIB = 1 << 20


class RemoteTool(Protocol):
    """How a contestant saves to a bucket, and loads from it."""

    name: ClassVar[str]
    module: ClassVar[str]
    """What must be importable."""

    def __init__(self, server: Server, bucket: str, state: State) -> None: ...
    def save(self, step: int) -> None: ...
    def load(self, step: int) -> None: ...
    def close(self) -> None: ...


class _Remote:
    def __init__(self, server: Server, bucket: str, state: State) -> None:
        self.server, self.bucket, self.state = server, bucket, state
        self.open()

    def open(self) -> None:
        """What is built once."""

    def close(self) -> None:
        """Let go of threads and connections."""

    def url(self, name: object) -> str:
        return f"s3://{self.bucket}/{name}"


def _payload_of(state: State) -> memoryview:
    """All bytes of the state in one aligned buffer, filled up with others to a page's border."""
    buffer = system.aligned(state.nbytes)
    start = 0
    for tensor in state.tensors.values():
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        buffer[start : start + data.nbytes] = data.data
        start += data.nbytes
    return buffer


class _Plain(_Remote, ABC):
    """The bytes lie in one buffer, and come back into another one that was touched before."""

    module = "botocore"
    part_nbytes: ClassVar[int]
    at_once: ClassVar[int]

    def open(self) -> None:
        self.payload = _payload_of(self.state)
        self.found = system.aligned(len(self.payload))
        self.connect()

    def connect(self) -> None:
        """Make the client."""

    @property
    def parts(self) -> list[tuple[int, int]]:
        starts = range(0, len(self.payload), self.part_nbytes)
        return [(start, min(start + self.part_nbytes, len(self.payload))) for start in starts]

    def load(self, step: int) -> None:
        self.fetch(step)
        if self.found[-MIB:] != self.payload[-MIB:]:
            raise AssertionError("what came is not what was sent")

    @abstractmethod
    def fetch(self, step: int) -> None:
        """Fill ``found``."""


class _Threads(_Plain):
    """botocore's client, a thread for each part under way."""

    def connect(self) -> None:
        self.client = self.server.client(max_pool_connections=self.at_once)
        self.pool = ThreadPoolExecutor(self.at_once)

    def save(self, step: int) -> None:
        where = {"Bucket": self.bucket, "Key": str(step)}
        upload = self.client.create_multipart_upload(**where)["UploadId"]

        def send(number: int, start: int, stop: int) -> dict[str, object]:
            body = bytes(self.payload[start:stop])
            sent = self.client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumCRC32": sent["ChecksumCRC32"]}

        sending = [self.pool.submit(send, number, *part) for number, part in enumerate(self.parts, 1)]
        parts = {"Parts": [one.result() for one in sending]}
        self.client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts)

    def fetch(self, step: int) -> None:
        def get(start: int, stop: int) -> None:
            body = self.client.get_object(Bucket=self.bucket, Key=str(step), Range=f"bytes={start}-{stop - 1}")["Body"]
            while start < stop:
                start += body.readinto(self.found[start:stop])

        for one in [self.pool.submit(get, *part) for part in self.parts]:
            one.result()

    def close(self) -> None:
        self.pool.shutdown()
        self.client.close()


class _Tasks(_Plain):
    """aiobotocore's client, all parts on one event loop."""

    module = "aiobotocore"

    def connect(self) -> None:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import AioSession

        self.loop = asyncio.new_event_loop()
        config = AioConfig(max_pool_connections=self.at_once)
        self.making = AioSession().create_client("s3", config=config, **self.server.client_arguments)
        self.client = self.loop.run_until_complete(self.making.__aenter__())

    async def _each(self, calls: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        at_once = asyncio.Semaphore(self.at_once)

        async def one(call: Coroutine[Any, Any, Any]) -> Any:
            async with at_once:
                return await call

        return await asyncio.gather(*map(one, calls))

    def save(self, step: int) -> None:
        self.loop.run_until_complete(self._save({"Bucket": self.bucket, "Key": str(step)}))

    async def _save(self, where: dict[str, str]) -> None:
        upload = (await self.client.create_multipart_upload(**where))["UploadId"]

        async def send(number: int, start: int, stop: int) -> dict[str, object]:
            body = bytes(self.payload[start:stop])
            sent = await self.client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumCRC32": sent["ChecksumCRC32"]}

        parts = {"Parts": await self._each([send(number, *part) for number, part in enumerate(self.parts, 1)])}
        await self.client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts)

    def fetch(self, step: int) -> None:
        async def get(start: int, stop: int) -> None:
            wanted = {"Bucket": self.bucket, "Key": str(step), "Range": f"bytes={start}-{stop - 1}"}
            async with (await self.client.get_object(**wanted))["Body"] as body:
                async for piece in body.raw_stream.content.iter_any():
                    self.found[start : start + len(piece)] = piece
                    start += len(piece)

        self.loop.run_until_complete(self._each([get(*part) for part in self.parts]))

    def close(self) -> None:
        self.loop.run_until_complete(self.making.__aexit__(None, None, None))
        self.loop.close()


def _plain(kind: type[_Plain], client: str, mib: int, at_once: int) -> type[_Plain]:
    name = f"floor: {client}, {at_once} × {mib} MiB"
    return type("Plain", (kind,), {"name": name, "part_nbytes": mib * MIB, "at_once": at_once})


PLAIN = (
    _plain(_Threads, "botocore", 8, 4),
    _plain(_Threads, "botocore", 16, 2),
    _plain(_Threads, "botocore", 16, 4),
    _plain(_Threads, "botocore", 32, 8),
    _plain(_Tasks, "aiobotocore", 8, 8),
)


class Ckptman(_Remote):
    name = "ckptman"
    module = "ckptman"

    def open(self) -> None:
        from ckptman import CheckpointManager

        root, options = self.url("run"), self.server.storage_options
        self.manager = CheckpointManager(root, self.state.components, storage_options=options)

    def save(self, step: int) -> None:
        self.manager.save(step, block=True)

    def load(self, step: int) -> None:
        assert self.manager.restore(step) is not None

    def close(self) -> None:
        self.manager.close()


class Dcp(_Remote):
    name = "DCP, fsspec"
    module = "torch.distributed.checkpoint"

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        writer = FsspecWriter(self.url(step), **self.server.storage_options)
        dcp.save(self.state.dicts, storage_writer=writer, no_dist=True)

    def load(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        reader = FsspecReader(self.url(step), **self.server.storage_options)
        dcp.load(self.state.dicts, storage_reader=reader, no_dist=True)  # in place: the tensors are the live ones


class TorchSave(_Remote):
    name = "torch.save, fsspec"
    module = "torch"

    def save(self, step: int) -> None:
        import fsspec

        with fsspec.open(self.url(step), "wb", **self.server.storage_options) as file:
            torch.save(self.state.dicts, file)

    def load(self, step: int) -> None:
        import fsspec

        with fsspec.open(self.url(step), "rb", **self.server.storage_options) as file:
            place(self.state, torch.load(file, weights_only=True))


class Connector(_Remote):
    name = "s3torchconnector"
    module = "s3torchconnector"

    def open(self) -> None:
        from s3torchconnector import S3Checkpoint, S3ClientConfig

        os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = self.server.access, self.server.secret
        config = S3ClientConfig(force_path_style=True)
        self.checkpoint = S3Checkpoint("us-east-1", endpoint=self.server.endpoint, s3client_config=config)

    def save(self, step: int) -> None:
        with self.checkpoint.writer(self.url(step)) as writer:
            torch.save(self.state.dicts, writer)

    def load(self, step: int) -> None:
        with self.checkpoint.reader(self.url(step)) as reader:
            place(self.state, torch.load(reader, weights_only=True))


def place(state: State, loaded: dict[str, Any]) -> None:
    """Bring what torch has loaded into the live objects."""
    state.model.load_state_dict(loaded["model"])
    state.optimizer.load_state_dict(loaded["optimizer"])


REMOTE_RIVALS = (Dcp, TorchSave, Connector)
