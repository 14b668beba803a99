"""
An object in parts, create-only: uploaded while its bytes still come, seen by nobody before it is whole.

At most `IN_FLIGHT_NBYTES` of parts are on their way and one more is being filled, so an upload takes 64 MiB, whatever
the size of the object; above 156 GiB parts grow, since there can be 10,000 of them, and at least one is on its way.
Uploads at the same time share what may be on its way, but for one part of each: a second one takes 32 MiB more.
What fits into one part is a plain put. Each part under way has a thread, which ends with the upload, or sooner.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ckptman.errors import StorageError
from ckptman.storage.body import PIECE_NBYTES
from ckptman.storage.foreign import is_transient
from ckptman.storage.parts import Part

if TYPE_CHECKING:
    from ckptman.storage.s3 import S3Driver

MIB = 1 << 20
PART_NBYTES = 16 * MIB
IN_FLIGHT_NBYTES = 48 * MIB
MAX_PARTS = 10_000
MAX_NBYTES = 5 << 40
"""Of one object: S3's own limits."""


Answer = Mapping[str, Any]

_SUM = "x-amz-checksum-"


class InFlight:
    """How many bytes of parts are on their way, of all uploads of a driver."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._nbytes = 0

    def add(self, nbytes: int) -> None:
        """So many more are, or fewer."""
        with self._mutex:
            self._nbytes += nbytes

    def has_room(self, nbytes: int) -> bool:
        """Whether *nbytes* more may be."""
        return self._nbytes + nbytes <= IN_FLIGHT_NBYTES


class Parts:
    """An `Upload` to S3. Sends part after part while the caller goes on writing, each again where it failed."""

    def __init__(self, driver: S3Driver, path: str) -> None:
        self._driver = driver
        self._path = path
        self._nonce = secrets.token_hex(16)  # tells our own object, the answer to whose creation was lost
        self._part_nbytes = PART_NBYTES
        self._upload: str | None = None
        self._part: Part | None = None  # that is being filled
        self._free: list[Part] = []
        self._sent: list[dict[str, object]] = []
        self._in_flight: deque[tuple[int, Part, Future[Any]]] = deque()
        self._sends_direct = False
        self._senders: ThreadPoolExecutor | None = None
        self._is_dropped = False

    def expect(self, nbytes: int) -> None:
        """Choose parts large enough for *nbytes*; refuse more than S3 can hold."""
        if nbytes > MAX_NBYTES:
            raise StorageError(
                f"{self._path!r} would have {nbytes} bytes, and S3 holds at most 5 TiB under one key; nothing was "
                "sent. Split the component, or save it from more ranks"
            )
        self._part_nbytes = max(self._part_nbytes, -(-nbytes // (MAX_PARTS * MIB)) * MIB)

    def write(self, data: memoryview) -> None:
        while data:
            if self._part is not None and self._part.is_full:
                self._send(self._part)
            if self._part is None:
                self._part = self._next()
            data = self._part.take(data)

    def finish(self) -> None:
        if self._upload is None:
            data = b"" if self._part is None else self._part.bytes
            self._driver.create(self._path, "put_object", nonce=self._nonce, marked=True, Body=data)
            return
        if self._part is not None:
            self._send(self._part)
        while self._in_flight:
            self._collect()
        self._end_senders()
        self._part, self._free = None, []  # the next file's parts may want the room
        self._driver.create(
            self._path,
            "complete_multipart_upload",
            nonce=self._nonce,
            UploadId=self._upload,
            MultipartUpload={"Parts": self._sent},
        )

    def drop(self) -> None:
        self._is_dropped = True  # what is being sent stops with the piece that it is at
        for _, _, future in self._in_flight:
            future.cancel()
        self._end_senders()  # a part that arrived after the abort would stay on the server
        while self._in_flight:
            self._land()
        self._part, self._free = None, []
        upload, self._upload = self._upload, None
        if upload is not None:
            self._driver.call("abort_multipart_upload", self._path, UploadId=upload)

    def _next(self) -> Part:
        if not self._free:
            return Part(self._part_nbytes)
        part = self._free.pop()
        part.empty()
        return part

    def _send(self, part: Part) -> None:
        number = len(self._sent) + len(self._in_flight) + 1
        if number > MAX_PARTS:
            raise StorageError(
                f"{self._path!r} has more than {MAX_PARTS} parts of {self._part_nbytes} bytes, the most that S3 takes"
            )
        if self._upload is None:
            self._upload = self._driver.begin_upload(self._path, self._nonce)
            self._sends_direct = self._driver.sends_direct(self._path)
        while self._in_flight and not self._driver.in_flight.has_room(self._part_nbytes):
            self._collect()
        self._in_flight.append((number, part, self._begin(number, part)))
        self._driver.in_flight.add(self._part_nbytes)
        self._part = None

    def _begin(self, number: int, part: Part) -> Future[Any]:
        if self._sends_direct:
            if self._senders is None:
                at_once = max(1, IN_FLIGHT_NBYTES // self._part_nbytes)
                self._senders = ThreadPoolExecutor(at_once, thread_name_prefix="ckptman-send")
            with suppress(RuntimeError):  # the interpreter is about to end, and starts no thread any more
                return self._senders.submit(self._send_direct, number, part)
        return self._driver.begin("upload_part", self._path, **self._of(number), Body=part.bytes)

    def _send_direct(self, number: int, part: Part) -> Answer | None:
        """The answer; None where the client has to ask by itself."""
        headers = self._driver.prepared("upload_part", self._path, **self._of(number), Body=part.bytes).sent(
            self._pieces(part)
        )
        return None if headers is None else _answer_of(headers)

    def _pieces(self, part: Part) -> Iterator[memoryview]:
        whole = part.bytes
        for start in range(0, len(whole), PIECE_NBYTES):
            if self._is_dropped:
                raise ConnectionAbortedError(f"the upload of {self._path!r} was dropped")
            yield whole[start : start + PIECE_NBYTES]

    def _collect(self) -> None:
        number, part, future = self._in_flight[0]
        answer: Answer | None = None
        try:
            answer = self._driver.wait(future)
        except Exception as error:
            if not is_transient(error):
                raise
        if answer is not None:
            self._free.append(part)
        else:  # nobody knows who still reads from the part, so its memory is not used again
            answer = self._driver.call("upload_part", self._path, **self._of(number), Body=part.bytes)
        self._land()
        sums = {name: value for name, value in answer.items() if name.startswith("Checksum") and name != "ChecksumType"}
        self._sent.append({"PartNumber": number, "ETag": answer["ETag"], **sums})

    def _land(self) -> None:
        self._in_flight.popleft()
        self._driver.in_flight.add(-self._part_nbytes)

    def _of(self, number: int) -> dict[str, object]:
        return {"UploadId": self._upload, "PartNumber": number}

    def _end_senders(self) -> None:
        senders, self._senders = self._senders, None
        if senders is not None:
            senders.shutdown()


def _answer_of(headers: Mapping[str, str]) -> Answer | None:
    """What the client would have made of *headers*, as far as it is asked for; None if they say too little."""
    sums = {
        f"Checksum{name[len(_SUM) :].upper()}": value
        for name, value in headers.items()
        if name.lower().startswith(_SUM) and name.lower() != f"{_SUM}type"
    }
    return {"ETag": headers["ETag"], **sums} if "ETag" in headers else None
