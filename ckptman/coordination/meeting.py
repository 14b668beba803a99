"""
How the ranks of a process group begin to talk, through a store that may remember their predecessors.

torchrun's agent keeps one store while it starts the workers again, so what a killed job said last may still be there
(in torch 2.13 gloo itself dials a dead worker's address after such a restart). As in `joining`, nothing is believed
that does not answer a nonce of this very process:

    rank 0    sets  call     to its nonce, which is the session's name
    rank r    sets  ack.<r>  to the call that it sees and its own nonce; again whenever another call is seen
    rank 0    sets  go       once all acks are to *its* call: the session and the nonces
    rank r    goes on with the session whose ``go`` has its nonce
"""

from __future__ import annotations

import time

import msgspec

from ckptman.coordination.torch_board import Store, reporting
from ckptman.errors import RankLost

MIN_PAUSE_S = 0.001
MAX_PAUSE_S = 0.1


class _Go(msgspec.Struct, frozen=True):
    session: str
    nonces: list[str]


def meet(store: Store, *, rank: int, world_size: int, nonce: str, timeout_s: float) -> str:
    """
    Wait until all ranks are there; return the session's name.

    Raises:
        RankLost: Not all came within *timeout_s*; names who is missing.
        StorageError: The store does not answer.
    """
    ranks = _Caller(store, world_size, nonce) if rank == 0 else _Called(store, rank, nonce)
    began, pause_s = time.monotonic(), MIN_PAUSE_S
    with reporting():
        while (session := ranks.session()) is None:
            waited_s = time.monotonic() - began
            if waited_s > timeout_s:
                named = ", ".join(map(str, ranks.missing))
                raise RankLost(
                    f"rank {rank} waited {waited_s:.0f} s for rank {named} of {world_size}: every rank has to open its "
                    "manager",
                    ranks=ranks.missing,
                    waited_s=waited_s,
                )
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, MAX_PAUSE_S)
    return session


class _Caller:
    def __init__(self, store: Store, world_size: int, nonce: str) -> None:
        self._store = store
        self._nonce = nonce
        self._nonces: dict[int, str] = {}
        self.missing = list(range(1, world_size))
        with reporting():
            store.set("call", nonce)

    def session(self) -> str | None:
        for rank in list(self.missing):
            call, _, nonce = _get(self._store, f"ack.{rank}").partition(":")
            if call == self._nonce:
                self._nonces[rank] = nonce
                self.missing.remove(rank)
        if self.missing:
            return None
        go = _Go(session=self._nonce, nonces=list(self._nonces.values()))
        self._store.set("go", msgspec.json.encode(go).decode())
        return self._nonce


class _Called:
    missing = (0,)

    def __init__(self, store: Store, rank: int, nonce: str) -> None:
        self._store = store
        self._rank = rank
        self._nonce = nonce
        self._answered = ""

    def session(self) -> str | None:
        call = _get(self._store, "call")
        if call != self._answered:
            self._store.set(f"ack.{self._rank}", f"{call}:{self._nonce}")
            self._answered = call
        told = _get(self._store, "go")
        go = msgspec.json.decode(told, type=_Go) if told else None
        return go.session if go is not None and self._nonce in go.nonces else None


def _get(store: Store, key: str) -> str:
    """What is set; empty where nothing is. Never waits."""
    return store.get(key).decode() if store.check([key]) else ""
