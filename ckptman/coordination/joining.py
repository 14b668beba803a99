"""
How ranks that share only a storage find each other, and nobody else: not even their own predecessors.

A job that was killed leaves its keys, and may come back under the same name, in the same folder, with some of its ranks
late and others already waiting. So a name proves nothing. Every process draws a nonce, and:

    rank 0    creates  <s>.call              *s*, its nonce, is the session's name from now on
    rank r    creates  <s>.here.<r>.<nonce>  for every call it sees that has no ``go`` yet: it cannot tell a live caller
                                             from a dead one, and need not
    rank 0    creates  <s>.go                once all ranks answered *its* call: the list of their nonces
    rank r    joins the session *s* whose ``go`` has *its own* nonce

A dead caller never says go, so whoever answered it waits on, for a live one. A dead rank's answers are to calls that
are as dead, or (it died while rank 0 was calling) in a list in which its successor's nonce stands too. What was said
in an older session has that session's name, which nobody of the new one reads. So:

- *a restarted job* never meets its predecessor, killed at whatever point;
- *a late rank* is waited for, until *timeout_s*; a missing one is named;
- *a rank that is restarted alone* finds no call, since its job goes on without it (and raises `RankLost`): it waits
  until the job has been restarted, or names rank 0 as missing;
- *two processes that say they are one rank*: the second one is left out, or refused as soon as both have joined.
"""

from __future__ import annotations

import re
import time

import msgspec

from ckptman.coordination.storage_board import GO, StorageBoard
from ckptman.errors import RankLost
from ckptman.storage.base import KeyMissing, Storage

MAX_PAUSE_S = 0.5

_CALL = re.compile(r"([0-9a-f]{16})\.call")
_GO = re.compile(r"([0-9a-f]{16})\.go")
_HERE = re.compile(r"([0-9a-f]{16})\.here\.([0-9]+)\.([0-9a-f]{16})")


class _Call(msgspec.Struct, frozen=True):
    world_size: int
    host: str


def join(storage: Storage, folder: str, *, rank: int, world_size: int, nonce: str, host: str, timeout_s: float) -> str:
    """
    Meet all ranks; return the session's name.

    Raises:
        RankLost: Not all came within *timeout_s*; names who is missing.
        ValueError: Rank 0 says that there are more, or fewer, ranks.
        StorageError: The medium failed.
    """
    meeting = _Meeting(storage, folder, rank=rank, world_size=world_size, nonce=nonce, host=host)
    began, pause_s = time.monotonic(), 0.01
    if rank == 0:
        meeting.call()
    while (session := meeting.gathered() if rank == 0 else meeting.answered()) is None:
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise meeting.missing(waited_s)
        time.sleep(min(pause_s, max(0.0, timeout_s - waited_s) + 0.001))
        pause_s = min(1.5 * pause_s, MAX_PAUSE_S)
    return session


class _Meeting:
    def __init__(self, storage: Storage, folder: str, *, rank: int, world_size: int, nonce: str, host: str) -> None:
        self._storage = storage
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._nonce = nonce
        self._host = host
        self._answered: set[str] = set()
        self._refused: set[str] = set()  # sessions that began without us
        self._names: list[str] = []

    def call(self) -> None:
        call = _Call(world_size=self._world_size, host=self._host)
        self._board(self._nonce).pin("call", msgspec.json.encode(call))

    def gathered(self) -> str | None:
        """Say go if all answered; the session if so."""
        nonces = self._here(self._nonce)
        if len(nonces) < self._world_size - 1:
            return None
        self._board(self._nonce).pin(
            GO, msgspec.json.encode(sorted(nonce for many in nonces.values() for nonce in many))
        )
        return self._nonce

    def answered(self) -> str | None:
        """Answer all calls; the session that goes on with us, if one does."""
        self._look()
        going = {match[1] for name in self._names if (match := _GO.fullmatch(name))}
        for session in going - self._refused:
            if self._nonce in msgspec.json.decode(self._board(session).read(GO), type=list[str]):
                return session
            self._refused.add(session)
        for name in self._names:
            match = _CALL.fullmatch(name)
            if match and match[1] not in going | self._answered:
                self._answer(match[1])
        return None

    def _answer(self, session: str) -> None:
        board = self._board(session)
        try:
            call = msgspec.json.decode(board.read("call"), type=_Call)
        except KeyMissing:  # swept a moment ago
            return
        self._answered.add(session)
        if call.world_size == self._world_size:  # a predecessor may have had another size
            board.pin(f"here.{self._rank}.{self._nonce}", self._host.encode())

    def missing(self, waited_s: float) -> RankLost:
        """What to raise after all that waiting."""
        where = f"{self._folder!r} in {self._storage.url}"
        if self._rank == 0:
            here = self._here(self._nonce)
            ranks = [rank for rank in range(1, self._world_size) if rank not in here]
            named = ", ".join(map(str, ranks))
            text = f"of {self._world_size} ranks, these did not come to {where} within {waited_s:.0f} s: {named}"
        else:
            ranks = [0]
            text = (
                f"rank {self._rank} waited {waited_s:.0f} s in {where} for rank 0 of {self._world_size} to begin: "
                "it is missing, or still waits for others"
            )
        return RankLost(f"{text}. Have all ranks the same job, world size and root?", ranks=ranks, waited_s=waited_s)

    def _here(self, session: str) -> dict[int, set[str]]:
        self._look()
        found: dict[int, set[str]] = {}
        for match in (_HERE.fullmatch(name) for name in self._names):
            if match and match[1] == session and 0 < int(match[2]) < self._world_size:
                found.setdefault(int(match[2]), set()).add(match[3])
        return found

    def _look(self) -> None:
        self._names = [stored.key.removeprefix(f"{self._folder}/") for stored in self._storage.listing(self._folder)]

    def _board(self, session: str) -> StorageBoard:
        return StorageBoard(self._storage, self._folder, session)
