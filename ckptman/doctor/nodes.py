"""
Several machines that open the same root: do they see the same one, and are they kept from each other there?

They know nothing of each other but the root, so they meet in it, in the folder ``doctor-nodes``. *id* is a node's own.

1. Each node says hello in ``<id>/hello``, and answers the hello of every other in ``<other>/ack-<id>``. A hello that
   an earlier examination left answers nobody: only those count who answered us.
2. With N - 1 answers the group is complete. Its name is made of all ids: who sees others than we do is not in it.
3. Everybody says that it is ready, waits until all are, and races for the same keys. Then each tells what it won.
4. One holds a file lock while the others try to take it.
5. Everybody says that it is done, and goes; the one with the lowest id waits for all, and removes everything.

Every wait is bounded. No clocks are compared.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from ckptman.doctor.exclusion import judge_race
from ckptman.doctor.findings import Finding
from ckptman.doctor.partner import race
from ckptman.errors import StorageError
from ckptman.repository.file_lock import RootLock
from ckptman.storage.base import KeyExists, Storage

FOLDER = "doctor-nodes"
ROUNDS = 60
POLL_S = 0.05
MAX_NBYTES = 1 << 20


class _TimedOut(Exception):
    """The others did not do in time what we wait for."""


def meet(storage: Storage, *, nodes: int, timeout_s: float, missing: int = 0) -> Iterator[Finding]:
    """
    The findings of *nodes* machines that call this at about the same time, this one among them.

    Waits *timeout_s* seconds for the others to come, and as long for each step that they take together. *missing* is
    how many directories, the root and those above it, were not there: where they were not for one of us, they go.
    """
    node = _Node(storage, secrets.token_hex(8), nodes, timeout_s, missing)
    try:
        yield from node.look()
    except _TimedOut as error:
        yield Finding(name="nodes", verdict="bad", what=str(error))
    except StorageError as error:
        yield Finding(name="nodes", verdict="bad", what=f"the storage failed: {error}")
    finally:
        node.leave()


@dataclass(slots=True)
class _Node:
    storage: Storage
    id: str
    nodes: int
    timeout_s: float
    missing: int
    group: str = ""
    members: tuple[str, ...] = ()
    made: list[str] = field(default_factory=list)  # keys of ours, until somebody else removes them

    def look(self) -> Iterator[Finding]:
        yield self._gather()
        self._together("ready")
        won = race(self.storage, folder=f"{FOLDER}/{self.group}", rounds=ROUNDS, token=self.id)
        self.made += won
        self._put(f"{self.group}/won-{self.id}", json.dumps(won).encode())
        self._together("won")
        winners = {one: json.loads(self._read(f"{self.group}/won-{one}")) for one in self.members}
        yield judge_race(self.storage, winners, name="race of the nodes", who="machines")
        if self.storage.lock_path is not None:
            yield self._locks()
        if self.id == self.members[0]:
            self._together("done")
            self._remove_everything()
        else:
            self._put(f"{self.group}/done-{self.id}", b"x")
        self.made = []

    def leave(self) -> None:
        """Remove what is ours, where the one who removes everything could not."""
        with suppress(StorageError):
            self.storage.delete(self.made)

    # ------------------------------------------------------------------ meeting

    def _gather(self) -> Finding:
        greeting = {"host": socket.gethostname(), "missing": self.missing}
        self._put(f"{self.id}/hello", json.dumps(greeting).encode())
        answered = self._wait(self._answers, "the other nodes", self.nodes - 1)
        self.members = tuple(sorted({self.id, *answered}))
        self.group = hashlib.sha256(",".join(self.members).encode()).hexdigest()[:16]
        greetings = [json.loads(self._read(f"{one}/hello")) for one in self.members]
        self.missing = max(one["missing"] for one in greetings)
        hosts = [one["host"] for one in greetings]
        if len(self.members) > self.nodes:
            raise _TimedOut(f"{len(self.members)} nodes came instead of {self.nodes}: {', '.join(hosts)}")
        what = f"{self.nodes} nodes see the same root: {', '.join(hosts)}"
        return Finding(name="nodes", verdict="ok", what=what, figures={"nodes": len(self.members)})

    def _answers(self) -> set[str]:
        """Answer whoever was not answered yet; return who answered us."""
        keys = {stored.key.removeprefix(f"{FOLDER}/") for stored in self.storage.listing(FOLDER)}
        for other in {key.partition("/")[0] for key in keys if key.endswith("/hello")} - {self.id}:
            if f"{other}/ack-{self.id}" not in keys:
                self._put(f"{other}/ack-{self.id}", b"x")
        mine = f"{self.id}/ack-"
        return {key.removeprefix(mine) for key in keys if key.startswith(mine)}

    def _together(self, step: str) -> None:
        """Say that we got as far as *step*, and wait until all did."""
        with suppress(KeyExists):
            self._put(f"{self.group}/{step}-{self.id}", b"x")
        self._wait(lambda: self._at(step), f"all nodes to be {step}", self.nodes)

    def _at(self, step: str) -> set[str]:
        keys = {stored.key for stored in self.storage.listing(f"{FOLDER}/{self.group}")}
        return {one for one in self.members if f"{FOLDER}/{self.group}/{step}-{one}" in keys}

    def _wait(self, look: Callable[[], Collection[str]], what: str, count: int) -> Collection[str]:
        ends_at = time.monotonic() + self.timeout_s
        while len(found := look()) < count:
            if time.monotonic() >= ends_at:
                raise _TimedOut(
                    f"waited {self.timeout_s:g} s for {what}, and saw {len(found)} of {count}: were all started, and "
                    "on the same root?"
                )
            time.sleep(POLL_S)
        return found

    # ------------------------------------------------------------------ locks

    def _locks(self) -> Finding:
        assert self.storage.lock_path is not None
        lock = RootLock(self.storage.lock_path.parent / FOLDER / self.group / "probe.lock")
        holder = self.members[0]
        if self.id == holder:
            self.made.append(f"{FOLDER}/{self.group}/probe.lock")
            taken = lock.acquire(0)
            self._put(f"{self.group}/held-{holder}", b"x" if taken else b"")
        else:
            self._wait(lambda: {holder} & self._at("held"), "the lock to be held", 1)
            taken = lock.acquire(0)
        self._put(f"{self.group}/tried-{self.id}", b"x" if taken else b"")
        self._together("tried")
        if taken:
            lock.release()
        owners = [one for one in self.members if self._read(f"{self.group}/tried-{one}")]
        if owners == [holder]:
            return Finding(name="locks of the nodes", verdict="ok", what="a lock of one machine keeps the others out")
        what = f"{len(owners)} machines held one lock at a time: two jobs could write at once, and one would be fenced"
        return Finding(name="locks of the nodes", verdict="bad", what=what)

    # ------------------------------------------------------------------ keys

    def _put(self, name: str, data: bytes) -> None:
        key = f"{FOLDER}/{name}"
        self.storage.create(key, data)
        self.made.append(key)

    def _read(self, name: str) -> bytes:
        return self.storage.read(f"{FOLDER}/{name}", limit=MAX_NBYTES)

    def _remove_everything(self) -> None:
        """Also what examinations left that were cut short."""
        self.storage.delete([stored.key for stored in self.storage.listing(FOLDER)])
        if self.storage.lock_path is not None:
            for path in self.storage.lock_path.parents[: self.missing]:
                with suppress(OSError):
                    path.rmdir()
