"""
Azure's blobs by their own requests, through the client that adlfs has set up: blocks, conditions, entity tags.

adlfs alone would hold a large file on the local disk until it is whole, and has no word for changing a value that
nobody else has changed; and whatever fails, it tries again within our own trying, after 15 s at the least.

*Lost answers* are settled as on S3: every blob carries a nonce in its metadata, and one request tells whether what lies
there is ours.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast

from ckptman.errors import StorageError
from ckptman.storage.base import Buffer
from ckptman.storage.body import Body
from ckptman.storage.driver import Upload, create, get_each, refuse_above
from ckptman.storage.foreign import is_missing, is_transient, status_of
from ckptman.storage.parts import Part
from ckptman.storage.retry import Retry

Result = TypeVar("Result")

MIB = 1 << 20
BLOCK_NBYTES = 8 * MIB
BLOCKS_IN_FLIGHT = 3
MAX_BLOCKS = 50_000
MAX_BLOCK_NBYTES = 4000 * MIB
"""Of one blob: Azure's own limits."""
STALE = timedelta(days=1)
_NONCE = "ckptman_nonce"


def _send_once(request: Any) -> None:
    """Azure's client calls this before it sends *request*, whose headers tell its length."""
    http = request.http_request
    if isinstance(http.data, bytes):
        http.data = Body(http.data)


_ONCE: dict[str, Any] = {"retry_total": 0, "raw_request_hook": _send_once}  # trying again is ours


class AzureDriver:
    """A `Driver` over adlfs. A path is the container, ``/``, and the blob's name."""

    can_swap = True

    def __init__(self, filesystem: Any, retry: Retry) -> None:
        self._fs = filesystem
        self._retry = retry
        # adlfs hands the timeouts of its user to some of its own calls, and keeps them for that.
        self._every: dict[str, Any] = {**_ONCE, **getattr(filesystem, "_timeout_kwargs", {})}

    # requests

    def begin(self, path: str, method: str, *arguments: Any, **more: Any) -> Future[Any]:
        """The request *method* of the blob's client, under way: sent once."""
        return self._begin(self._ask(path, method, *arguments, **more))

    def wait(self, future: Future[Result]) -> Result:
        """Its result. Interrupted (Ctrl-C), it cancels what is under way."""
        try:
            return future.result()
        finally:
            future.cancel()

    def ask(self, path: str, method: str, *arguments: Any, **more: Any) -> Any:
        """The answer to one request, sent once."""
        return self.wait(self.begin(path, method, *arguments, **more))

    def call(self, path: str, method: str, *arguments: Any) -> Any:
        """The answer to one request, sent again where that may help."""
        return self._retry(lambda: self.ask(path, method, *arguments), is_transient=is_transient)

    def create(self, path: str, method: str, what: Any, nonce: str) -> None:
        """Send the create-only request *method* with *what*, and find out what came of it."""
        from azure.core import MatchConditions  # a guest: only who has adlfs has it

        arguments = {"metadata": {"is_directory": "false", _NONCE: nonce}, "match_condition": MatchConditions.IfMissing}
        create(
            lambda: self.ask(path, method, what, **arguments), self._retry, is_ours=lambda: self._is_marked(path, nonce)
        )

    def _is_marked(self, path: str, nonce: str) -> bool:
        with suppress(Exception):  # whatever it is: the first error says more
            return bool(self.call(path, "get_blob_properties").metadata.get(_NONCE) == nonce)
        return False

    async def _ask(self, path: str, method: str, *arguments: Any, **more: Any) -> Any:
        container, _, name = path.partition("/")
        async with self._fs.service_client.get_blob_client(container=container, blob=name) as client:
            return await getattr(client, method)(*arguments, **self._every, **more)

    def _begin(self, call: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(call, self._fs.loop)

    # writing

    def put_new(self, path: str, data: Buffer) -> None:
        self.create(path, "upload_blob", bytes(data), secrets.token_hex(16))

    def upload(self, path: str) -> Upload:
        return Blocks(self, path)

    def swap(self, path: str, data: bytes, expected: str) -> None:
        from azure.core import MatchConditions

        condition = {"etag": expected, "match_condition": MatchConditions.IfNotModified}
        self.ask(path, "upload_blob", data, overwrite=True, metadata={"is_directory": "false"}, **condition)

    # reading

    def get(self, path: str, limit: int) -> tuple[bytes, str]:
        async def get() -> tuple[bytes, str]:
            found = await self._ask(path, "download_blob")
            refuse_above(int(found.size), limit, path)
            return bytes(await found.readall()), str(found.properties.etag)

        return self.wait(self._begin(get()))

    def get_into(self, path: str, start: int, into: memoryview) -> int:
        async def get_into() -> int:
            try:
                found = await self._ask(path, "download_blob", start, len(into))
            except Exception as error:
                if status_of(error) == 416:
                    return 0  # it begins beyond the end
                raise
            return await _receive(found, into)

        if not into:
            self.size(path)
            return 0
        return self.wait(self._begin(get_into()))

    def get_each(self, path: str, start: int, into: Sequence[memoryview]) -> int:
        return get_each(self.get_into, path, start, into)

    def get_beginning(self, path: str, into: memoryview) -> tuple[int, int]:
        return self.get_into(path, 0, into), self.size(path)

    def size(self, path: str) -> int:
        return int(self.ask(path, "get_blob_properties").size)

    def modified_at(self, path: str) -> datetime:
        return cast(datetime, self.ask(path, "get_blob_properties").last_modified)

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        container = folder.partition("/")[0]
        for found in self._list(f"{folder}/", "list_blobs", include=["metadata"]):
            metadata = {name.lower(): value for name, value in (found.metadata or {}).items()}
            if "true" not in (metadata.get("hdi_isfolder"), metadata.get("is_directory")):  # a folder that is stored
                yield f"{container}/{found.name}", int(found.size)

    def children(self, folder: str) -> list[str]:
        container = folder.partition("/")[0]
        found = self._list(f"{folder}/", "walk_blobs", delimiter="/")
        return [f"{container}/{one.name.rstrip('/')}" for one in found if one.name.endswith("/")]

    def _list(self, prefix: str, method: str, **more: Any) -> list[Any]:
        container, _, start = prefix.partition("/")

        async def pages() -> list[Any]:
            async with self._fs.service_client.get_container_client(container=container) as client:
                listing = getattr(client, method)(name_starts_with=start, **self._every, **more)
                return [found async for found in listing]

        return self.wait(self._begin(pages()))

    # removing

    def delete(self, path: str) -> None:
        try:
            self.ask(path, "delete_blob")
        except Exception as error:
            if not is_missing(error):
                raise

    def remove_folder(self, folder: str) -> None:
        """Nothing: there are no folders, or they are accounts' own affair, and an empty one does no harm."""

    def remove_stale(self, root: str, prefix: str) -> None:
        """Objects beginning with *prefix*; blocks that nobody committed Azure drops by itself, after a week."""
        container, before = prefix.partition("/")[0], datetime.now(UTC) - STALE
        for found in self._list(prefix, "list_blobs"):
            if found.last_modified < before:
                self.delete(f"{container}/{found.name}")


class Blocks:
    """
    An `Upload` to Azure. Sends block after block while the caller goes on writing, each again where it failed.

    It takes 56 MiB, whatever the size of the blob: three blocks of 8 MiB on their way, twice since the client copies
    them, and the one being filled. Blocks that nobody committed are invisible; Azure drops them after a week.
    """

    def __init__(self, driver: AzureDriver, path: str) -> None:
        self._driver = driver
        self._path = path
        self._nonce = secrets.token_hex(16)  # tells our own blob, and our blocks from those of others at this path
        self._block_nbytes = BLOCK_NBYTES
        self._part: Part | None = None  # that is being filled
        self._names: list[str] = []
        self._in_flight: deque[tuple[str, bytes, Future[Any]]] = deque()

    def expect(self, nbytes: int) -> None:
        """Choose blocks large enough for *nbytes*; refuse more than Azure can hold."""
        if nbytes > MAX_BLOCKS * MAX_BLOCK_NBYTES:
            raise StorageError(
                f"{self._path!r} would have {nbytes} bytes, and Azure holds at most 190 TiB under one key; nothing was "
                "sent. Split the component, or save it from more ranks"
            )
        self._block_nbytes = max(self._block_nbytes, -(-nbytes // (MAX_BLOCKS * MIB)) * MIB)

    def write(self, data: memoryview) -> None:
        while data:
            if self._part is None:
                self._part = Part(self._block_nbytes)
            if self._part.is_full:
                self._send(self._part)
            data = self._part.take(data)

    def finish(self) -> None:
        if not self._names:
            data = b"" if self._part is None else bytes(self._part.bytes)
            self._driver.create(self._path, "upload_blob", data, self._nonce)
            return
        if self._part is not None:
            self._send(self._part)
        while self._in_flight:
            self._collect()
        self._driver.create(self._path, "commit_block_list", self._names, self._nonce)

    def drop(self) -> None:
        for _, _, future in self._in_flight:
            future.cancel()
        self._in_flight.clear()
        self._part = None

    def _send(self, part: Part) -> None:
        if len(self._names) >= MAX_BLOCKS:
            raise StorageError(
                f"{self._path!r} has more than {MAX_BLOCKS} blocks of {self._block_nbytes} bytes, the most that Azure "
                "takes"
            )
        if len(self._in_flight) >= max(1, BLOCKS_IN_FLIGHT * BLOCK_NBYTES // self._block_nbytes):
            self._collect()
        name, block = f"{self._nonce}{len(self._names):05}", bytes(part.bytes)
        part.empty()
        self._names.append(name)
        self._in_flight.append((name, block, self._driver.begin(self._path, "stage_block", name, block)))

    def _collect(self) -> None:
        name, block, future = self._in_flight[0]
        try:
            self._driver.wait(future)
        except Exception as error:
            if not is_transient(error):
                raise
            self._driver.call(self._path, "stage_block", name, block)
        self._in_flight.popleft()


async def _receive(found: Any, into: memoryview) -> int:
    done = 0
    async for piece in found.chunks():
        into[done : done + len(piece)] = piece
        done += len(piece)
    if done != found.size:
        raise ConnectionError(f"the answer ended after {done} of {found.size} bytes")
    return done
