"""
Large bodies of S3 requests, sent and received on other threads than the event loop's, without a copy.

The client that s3fs has made prepares and signs a request, with all that its user has configured. Then this takes it
off the client's hands, whose event loop would copy every byte up to three times, on the one thread that all requests
share. What comes back counts only if it is just what was asked for; after anything else the client is to ask by
itself, and its answer, or its error, counts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from http.client import HTTPException, HTTPResponse
from traceback import clear_frames
from typing import Any

from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies
from urllib3.exceptions import HTTPError

from ckptman.storage.driver import cut

_EVENTS = "before-send.s3.GetObject", "before-send.s3.UploadPart"
PIECE_NBYTES = 1 << 20
"""What is given to a socket at a time, whose time limit is for each."""

_OWN_TRANSPORTS = frozenset({"connector_args", "http_session_cls"})

_is_prepared_only: ContextVar[bool] = ContextVar("is_prepared_only", default=False)


class _HandedOver(Exception):
    """Carries a request out of the client that has prepared it."""

    def __init__(self, request: Any) -> None:
        self.request = request


def _hand_over(request: Any, **_: object) -> None:
    if _is_prepared_only.get():
        raise _HandedOver(request)


class Direct:
    """Requests by botocore's blocking transport with the settings of the clients of *filesystem* (s3fs's)."""

    def __init__(self, filesystem: Any) -> None:
        self._fs = filesystem
        self._transports: dict[Any, URLLib3Session] = {}  # by client; changed on the event loop only

    @property
    def is_usable(self) -> bool:
        """Whether the user has given the client no transport of another kind."""
        return not _OWN_TRANSPORTS & set(self._fs.config_kwargs)

    async def prepare(self, client: Any, sending: Awaitable[object]) -> Prepared:
        """The request that *client* prepares while it is *sending*. To be run as a task of its own, on the loop."""
        if client not in self._transports:
            self._transports[client] = self._transport_of(client)
            for event in _EVENTS:
                client.meta.events.register_last(event, _hand_over)
        _is_prepared_only.set(True)
        try:
            await sending
        except _HandedOver as handed:
            clear_frames(handed.__traceback__)  # they refer to each other, and to the body: 16 MiB of garbage
            return Prepared(self._transports[client], handed.request)
        raise AssertionError("the client has sent what it was only to prepare")

    def _transport_of(self, client: Any) -> URLLib3Session:
        # as botocore's own client makes it
        config, verify = client.meta.config, self._fs.client_kwargs.get("verify")
        if verify is None:
            verify = self._fs.session.get_config_variable("ca_bundle")
        return URLLib3Session(
            verify=True if verify is None else verify,
            proxies=get_environ_proxies(client.meta.endpoint_url) if config.proxies is None else config.proxies,
            proxies_config=config.proxies_config,
            timeout=(config.connect_timeout, config.read_timeout),
            max_pool_connections=config.max_pool_connections,
            client_cert=config.client_cert,
        )


class Prepared:
    """A signed request, not sent yet."""

    def __init__(self, transport: URLLib3Session, request: Any) -> None:
        self._transport = transport
        self._request = request

    def into(self, memory: Sequence[memoryview], start: int) -> int | None:
        """
        Send it; fill *memory* with the bytes from *start* on, and return how many came.

        Returns:
            None if the server answered anything else. *memory* was not changed then.

        Raises:
            ConnectionError: The answer ended too early.
            botocore.exceptions.HTTPClientError: There was none.
        """
        raw = self._transport.send(self._request).raw
        try:
            nbytes = _promised(raw, start)
            if nbytes is None or nbytes > sum(map(len, memory)):
                return None
            plain = raw._original_response  # urllib3's own readinto makes bytes first, and copies them
            for part in cut(memory, nbytes):
                _fill(part, plain)
            raw.release_conn()
        except (HTTPError, HTTPException) as error:
            raise ConnectionError(f"the answer broke off: {error}") from error
        finally:
            raw.close()  # the connection too, unless it was released: what is left on it belongs to nobody
        return nbytes

    def sent(self, body: Iterable[memoryview]) -> Mapping[str, str] | None:
        """
        Send it with *body*, which are the bytes that it was prepared for; return the headers of the answer.

        Returns:
            None if the server answered anything but that it took them.

        Raises:
            botocore.exceptions.HTTPClientError: There was no answer.
        """
        self._request.body = body
        answer = self._transport.send(self._request)
        return answer.headers if answer.status_code == 200 else None


def _promised(raw: Any, start: int) -> int | None:
    """How many bytes from *start* on the answer has; None if it is none about them."""
    if raw.status != 206 or not raw.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        return None
    if "Content-Encoding" in raw.headers:
        return None
    length = raw.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _fill(memory: memoryview, answer: HTTPResponse) -> None:
    done = 0
    while done < len(memory):
        got = answer.readinto(memory[done : done + PIECE_NBYTES])
        if not got:
            raise ConnectionError(f"the answer ended after {done} of {len(memory)} bytes")
        done += got
