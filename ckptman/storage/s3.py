"""
S3 by its own requests, which s3fs signs and sends: conditional puts, parallel parts, ranged reads, one LIST a page.

Everything but large bodies (s3_direct.py) runs on the event loop that fsspec has in a thread of its own. The client
adds a CRC32 to every put and part, and the server refuses bytes that differ from theirs.

*Lost answers.* An object is marked with a nonce. Where a create-only request failed, or its repetition was refused,
the object is asked for its nonce: with ours, the request took effect, and only its answer was lost.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ckptman.errors import StorageError
from ckptman.storage.base import Buffer
from ckptman.storage.body import PIECE_NBYTES, Body
from ckptman.storage.driver import Upload, create, cut, refuse_above
from ckptman.storage.foreign import is_transient, status_of
from ckptman.storage.retry import Retry
from ckptman.storage.s3_upload import PART_NBYTES, InFlight, Parts

if TYPE_CHECKING:
    from ckptman.storage.s3_direct import Prepared

Result = TypeVar("Result")

READS_AT_ONCE = 8
RECEIVED_NBYTES = 1 << 20
"""From here on, receiving takes longer than asking, and is worth a connection of its own."""

STALE = timedelta(days=1)
_NONCE = "ckptman-nonce"


class S3Driver:
    """A `Driver` over s3fs. A path is the bucket, ``/``, and the object's key."""

    can_swap = True

    def __init__(self, filesystem: Any, retry: Retry) -> None:
        self._fs = filesystem
        self._retry = retry
        self.in_flight = InFlight()
        from ckptman.storage.s3_direct import Direct  # botocore is there where an S3 driver is

        self._direct = Direct(filesystem)

    # requests

    def call(self, method: str, path: str, **arguments: Any) -> Mapping[str, Any]:
        """The answer to one request, sent again where that may help."""
        return self._retry(lambda: self.wait(self.begin(method, path, **arguments)), is_transient=is_transient)

    def begin(self, method: str, path: str, **arguments: Any) -> Future[Mapping[str, Any]]:
        """One request, under way: sent once."""
        return asyncio.run_coroutine_threadsafe(self._request(method, path, **arguments), self._fs.loop)

    def sends_direct(self, path: str) -> bool:
        """Whether parts of *path* can be `prepared`: not over TLS, where the client sends the sum behind each."""

        async def is_plain() -> bool:
            return str((await self._client(path)).meta.endpoint_url).startswith("http:")

        return self._direct.is_usable and self._run(is_plain())

    def prepared(self, method: str, path: str, **arguments: Any) -> Prepared:
        """One ``get_object`` or ``upload_part``, signed, for the caller's own thread to send."""

        async def prepared() -> Prepared:
            return await self._direct.prepare(*await self._sending(method, path, **arguments))

        return self._run(prepared())

    def wait(self, future: Future[Result]) -> Result:
        """Its result. Interrupted (Ctrl-C), it cancels what is under way."""
        try:
            return future.result()
        finally:
            future.cancel()

    def create(self, path: str, method: str, *, nonce: str, marked: bool = False, **arguments: Any) -> None:
        """
        Send the create-only request *method*, again where that may help, and find out what came of it.

        Args:
            path: Of the new object.
            method: ``put_object`` or ``complete_multipart_upload``.
            nonce: What the object is known by.
            marked: Whether this request itself carries the nonce.
            arguments: Of the request.
        """
        mark = {"Metadata": {_NONCE: nonce}} if marked else {}

        def send() -> None:
            self.wait(self.begin(method, path, IfNoneMatch="*", **mark, **arguments))

        create(send, self._retry, is_ours=lambda: self._is_marked(path, nonce))

    def begin_upload(self, path: str, nonce: str) -> str:
        """Begin an upload in parts; return its id."""
        return str(self.call("create_multipart_upload", path, Metadata={_NONCE: nonce})["UploadId"])

    def _is_marked(self, path: str, nonce: str) -> bool:
        with suppress(Exception):  # whatever it is: the first error says more
            return bool(self.call("head_object", path).get("Metadata", {}).get(_NONCE) == nonce)
        return False

    # writing

    def put_new(self, path: str, data: Buffer) -> None:
        self.create(path, "put_object", nonce=secrets.token_hex(16), marked=True, Body=data)

    def upload(self, path: str) -> Upload:
        return Parts(self, path)

    def swap(self, path: str, data: bytes, expected: str) -> None:
        self.wait(self.begin("put_object", path, Body=data, IfMatch=expected))

    # reading

    def get(self, path: str, limit: int) -> tuple[bytes, str]:
        async def get() -> tuple[bytes, str]:
            found = await self._request("get_object", path)
            try:
                nbytes = int(found["ContentLength"])
                refuse_above(nbytes, limit, path)
                into = bytearray(nbytes)
                await _receive(found["Body"], memoryview(into))
            finally:
                found["Body"].close()
            return bytes(into), str(found["ETag"])

        return self._run(get())

    def get_into(self, path: str, start: int, into: memoryview) -> int:
        if not into:
            self.size(path)
            return 0
        if len(into) <= PART_NBYTES:
            return self.get_each(path, start, [into])
        ranges = [(start + at, into[at : at + PART_NBYTES]) for at in range(0, len(into), PART_NBYTES)]
        return sum(nbytes for nbytes, _ in self._run(_together([self._get_range(path, at, [p]) for at, p in ranges])))

    def get_each(self, path: str, start: int, into: Sequence[memoryview]) -> int:
        nbytes = sum(map(len, into))
        if nbytes >= RECEIVED_NBYTES and self._direct.is_usable:
            found = self.prepared("get_object", path, Range=_range(start, nbytes)).into(into, start)
            if found is not None:
                return found
        return self._run(self._get_range(path, start, into))[0]

    def get_beginning(self, path: str, into: memoryview) -> tuple[int, int]:
        if not 0 < len(into) < RECEIVED_NBYTES:  # here one request more is no matter
            return self.get_into(path, 0, into), self.size(path)
        nbytes, size = self._run(self._get_range(path, 0, [into]))
        return nbytes, self.size(path) if size is None else size

    async def _get_range(self, path: str, start: int, into: Sequence[memoryview]) -> tuple[int, int | None]:
        """How many bytes came; and the size of the object, if the answer tells it."""
        room = sum(map(len, into))
        try:
            found = await self._request("get_object", path, Range=_range(start, room))
        except Exception as error:
            if status_of(error) == 416:
                return 0, 0 if start == 0 else None  # it begins beyond the end
            raise
        try:
            nbytes = int(found["ContentLength"])
            if nbytes > room:
                raise StorageError(f"{path!r}: asked for {room} bytes, the server sends {nbytes}")
            for part in cut(into, nbytes):
                await _receive(found["Body"], part)
        finally:
            found["Body"].close()
        size = str(found.get("ContentRange", "")).rpartition("/")[2]
        return nbytes, int(size) if size.isdigit() else None

    def size(self, path: str) -> int:
        return int(self.wait(self.begin("head_object", path))["ContentLength"])

    def modified_at(self, path: str) -> datetime:
        return cast(datetime, self.wait(self.begin("head_object", path))["LastModified"])

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        bucket = _bucket(folder)
        for page in self._pages(f"{folder}/"):
            for found in page.get("Contents", ()):
                yield f"{bucket}/{found['Key']}", int(found["Size"])

    def children(self, folder: str) -> list[str]:
        bucket = _bucket(folder)
        return [
            f"{bucket}/{found['Prefix'].rstrip('/')}"
            for page in self._pages(f"{folder}/", Delimiter="/")
            for found in page.get("CommonPrefixes", ())
        ]

    # removing

    def delete(self, path: str) -> None:
        self.wait(self.begin("delete_object", path))

    def remove_folder(self, folder: str) -> None:
        """Make servers that keep folders (SeaweedFS) forget one that is empty; one that is not, they leave alone."""
        self.delete(f"{folder}/")

    def remove_stale(self, root: str, prefix: str) -> None:
        before, bucket = datetime.now(UTC) - STALE, _bucket(root)
        for page in self._pages(prefix):
            for found in page.get("Contents", ()):
                if found["LastModified"] < before:
                    self.delete(f"{bucket}/{found['Key']}")
        for path, upload, began in list(self.uploads(root)):
            if began < before:
                self.call("abort_multipart_upload", path, UploadId=upload)

    def uploads(self, root: str) -> Iterator[tuple[str, str, datetime]]:
        """Unfinished uploads below *root*: the path, the upload's id, and when it began."""
        bucket, more = _bucket(root), cast("dict[str, object]", {})
        while True:
            page = self.call("list_multipart_uploads", f"{root}/", _key="Prefix", **more)
            for found in page.get("Uploads", ()):
                yield f"{bucket}/{found['Key']}", found["UploadId"], found["Initiated"]
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _pages(self, prefix: str, **arguments: object) -> Iterator[Mapping[str, Any]]:
        more: dict[str, object] = {}
        while True:
            page = self.call("list_objects_v2", prefix, _key="Prefix", **arguments, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    async def _request(self, method: str, path: str, *, _key: str = "Key", **arguments: Any) -> Mapping[str, Any]:
        _, sending = await self._sending(method, path, _key=_key, **arguments)
        return await sending

    async def _sending(
        self, method: str, path: str, *, _key: str = "Key", **arguments: Any
    ) -> tuple[Any, Awaitable[Mapping[str, Any]]]:
        """The client for *path*, and its call."""
        # s3fs has the session, the region of the bucket, and what users want added to requests (encryption, …). Its
        # own way of sending would try again, translate the error and sleep once more before raising it.
        bucket, _, key = path.partition("/")
        client = await self._client(path)
        send = getattr(client, method)
        if "Body" in arguments:
            arguments["Body"] = Body(arguments["Body"])
        arguments = self._fs._get_s3_method_kwargs(send, Bucket=bucket, **{_key: key}, **arguments)
        return client, send(**arguments)

    async def _client(self, path: str) -> Any:
        await self._fs.set_session()
        return await self._fs.get_s3(_bucket(path))

    def _run(self, call: Coroutine[Any, Any, Result]) -> Result:
        return self.wait(asyncio.run_coroutine_threadsafe(call, self._fs.loop))


def _range(start: int, nbytes: int) -> str:
    return f"bytes={start}-{start + nbytes - 1}"


async def _receive(body: Any, into: memoryview) -> None:
    done = 0
    while done < len(into):
        piece = await body.read(min(PIECE_NBYTES, len(into) - done))
        if not piece:
            raise ConnectionError(f"the answer ended after {done} of {len(into)} bytes")
        into[done : done + len(piece)] = piece
        done += len(piece)


async def _together(calls: list[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results; if one fails, the others are stopped first, so that none writes into memory afterwards."""
    at_once = asyncio.Semaphore(READS_AT_ONCE)

    async def one(call: Awaitable[Result]) -> Result:
        async with at_once:
            return await call

    tasks = [asyncio.ensure_future(one(call)) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _bucket(path: str) -> str:
    return path.partition("/")[0]
