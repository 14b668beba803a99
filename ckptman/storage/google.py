"""
Google's object store: what fsspec has no word for, by requests of its own through the client that gcsfs has set up.

A condition on the generation of an object makes a put create-only, and is the compare and swap of the lease. gcsfs
knows the first and not the second, and tries again by itself, within our own trying, so that a refusal after silence
could not be told from a refusal.

*Lost answers* are settled as on S3: an object put at once carries a nonce in its metadata. What is longer than
`SMALL_NBYTES` goes through gcsfs's own upload of a local file, as in `AnyDriver`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import secrets
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from ckptman.storage.base import Buffer
from ckptman.storage.driver import AnyDriver, create, refuse_above
from ckptman.storage.foreign import is_transient
from ckptman.storage.retry import Retry

Result = TypeVar("Result")

_NONCE = "ckptman_nonce"
_OF_UPLOADS = frozenset({"POST", "PUT"})
_NOBODY_HAS_IT = "0"
"""The generation of an object that is not there."""


class NoBucket(Exception):
    """A put found nothing to put into."""

    error_code = "NoSuchBucket"


class GoogleDriver(AnyDriver):
    """A `Driver` over gcsfs. A path is the bucket, ``/``, and the object's name."""

    can_swap = True

    def __init__(self, filesystem: Any, retry: Retry) -> None:
        super().__init__(filesystem, retry)
        send = type(filesystem)._request
        self._once, again = partial(inspect.unwrap(send), filesystem), partial(send, filesystem)

        async def request(method: str, path: str, *arguments: Any, **more: Any) -> Any:
            # gcsfs tries six times within our own five. Uploads of a local file need that: ours begins from the start.
            call = again if method.upper() in _OF_UPLOADS else self._once
            return await call(method, path, *arguments, **more)

        filesystem._request = request

    def put_new(self, path: str, data: Buffer) -> None:
        nonce, value = secrets.token_hex(16), bytes(data)
        create(
            lambda: self._put(path, value, {_NONCE: nonce}, _NOBODY_HAS_IT),
            self._retry,
            is_ours=lambda: self._is_marked(path, nonce),
        )

    def swap(self, path: str, data: bytes, expected: str) -> None:
        self._put(path, data, {}, expected)

    def get(self, path: str, limit: int) -> tuple[bytes, str]:
        found = self._ask("GET", _object(path))
        refuse_above(int(found["size"]), limit, path)
        # Exactly what was looked at: between the two requests another may have put a new generation there.
        return self._send("GET", _object(path), alt="media", generation=found["generation"]), str(found["generation"])

    def _is_marked(self, path: str, nonce: str) -> bool:
        with suppress(Exception):  # whatever it is: the first error says more
            found = self._retry(lambda: self._ask("GET", _object(path)), is_transient=is_transient)
            return bool(found.get("metadata", {}).get(_NONCE) == nonce)
        return False

    def _put(self, path: str, value: bytes, metadata: dict[str, str], generation: str) -> None:
        """Put *value* in place of *generation* of the object; `FileExistsError` if it is another by now."""
        bucket, _, name = path.partition("/")
        told = json.dumps({"name": name, "metadata": metadata})
        boundary = secrets.token_hex(16)  # nobody can have written it into the value
        body = b"".join(
            (
                f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{told}\r\n".encode(),
                f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n".encode(),
                value,
                f"\r\n--{boundary}--\r\n".encode(),
            )
        )
        url = f"{self._fs._location}/upload/storage/v1/b/{quote(bucket, safe='')}/o"
        kind = {"Content-Type": f'multipart/related; boundary="{boundary}"'}
        try:
            self._send("POST", url, headers=kind, data=body, uploadType="multipart", ifGenerationMatch=generation)
        except FileNotFoundError as error:
            if generation != _NOBODY_HAS_IT:
                raise
            raise NoBucket(f"there is no bucket {bucket!r}") from error

    def _ask(self, method: str, url: str, **more: Any) -> Any:
        return json.loads(self._send(method, url, **more))

    def _send(self, method: str, url: str, **more: Any) -> bytes:
        """The body of the answer to one request, sent once."""
        return bytes(self._run(self._once(method, url, **more))[3])

    def _run(self, call: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(call, self._fs.loop)
        try:
            return future.result()
        finally:
            future.cancel()  # interrupted (Ctrl-C), the request is of no use any more


def _object(path: str) -> str:
    bucket, _, name = path.partition("/")
    return f"b/{quote(bucket, safe='')}/o/{quote(name, safe='')}"
