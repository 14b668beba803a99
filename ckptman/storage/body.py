"""The bytes of a request, as the clients of object stores take them without a copy, and without sending them twice."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from ckptman.storage.base import Buffer

PIECE_NBYTES = 1 << 18
"""What is given to a connection at a time."""


class Body:
    """
    Bytes for two readers: a client that signs and sums a file, and aiohttp, which sends what it iterates over.

    Given the bytes themselves, the event loop would copy whatever the socket does not take at once. And aiohttp would
    send a PUT again by itself where a connection was cut: two requests, of which we would see one answer. This one can
    be sent once.
    """

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._is_sent = False

    def __len__(self) -> int:
        return len(self._data)

    def read(self, nbytes: int = -1) -> memoryview:
        """The next *nbytes*, or all that are left, where they lie: they are summed twice, and need no copy for it."""
        stop = len(self._data) if nbytes < 0 else min(len(self._data), self._at + nbytes)
        start, self._at = self._at, stop
        return self._data[start:stop]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to *offset*; return where that is."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        return self._at

    def tell(self) -> int:
        """Where the next ``read`` begins."""
        return self._at

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        if self._is_sent:
            raise ConnectionError("the connection was cut while a request was sent")
        self._is_sent = True
        for start in range(0, len(self._data), PIECE_NBYTES):
            yield self._data[start : start + PIECE_NBYTES]
