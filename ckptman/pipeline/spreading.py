"""
Replicated tensors from a distant storage: each byte is fetched by one rank of a host, and passed on in shared memory.

1. Every rank says which tensors it wants whole, and which memory it could share (that of one kernel, one mount).
2. Where all ranks of a host want a tensor, its pieces are dealt out among them.
3. In rounds: each fetches its pieces into memory that all of them have mapped; once all have, each copies everything
   from there to where it belongs, and checks every byte of it, as if it had been read from the storage.
4. What is left (shards, what ranks have of their own) each reads for itself.

Rounds are what all ranks of the job do together, so a failure in one reaches all, like any other. It is done where it
is faster: not for files, which the page cache keeps, and not where ranks talk to each other slowly.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from ckptman.format.manifest import File, Manifest
from ckptman.pipeline.ranks import Ranks
from ckptman.pipeline.reading import Placing, Readers, fill
from ckptman.repository.reading import CheckedReader, Piece, parts_of, pieces
from ckptman.state.dtensor import is_sharded
from ckptman.storage.base import Distant, Storage

ROUND_NBYTES = 32 << 20
"""What one rank may fetch in a round: its part of the shared memory, and all that this takes per rank."""

SMALLEST_NBYTES = 16 << 20
"""Below it a host saves less than the rounds cost."""

SLOWEST_ROUND_S = 0.25
"""Ranks that need longer to hear of each other (through files on a bucket) read each for itself."""

_MEMORY = Path("/dev/shm")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class _Wish(msgspec.Struct, frozen=True, array_like=True):
    """``memory``: names what this rank could share, empty for none. ``wanted``: a bit for each tensor, wanted whole."""

    memory: str
    wanted: bytes


class _Slot(NamedTuple):
    """A piece, where it lies (in its file, and in the shared memory during its round), and which member fetches it."""

    file: File
    piece: Piece
    start: int
    nbytes: int
    at: int
    member: int


class _Host(NamedTuple):
    """The ranks of one host, the numbers of the tensors that all of them want, and who fetches what in which round."""

    members: tuple[int, ...]
    tensors: frozenset[int]
    rounds: list[list[_Slot]]


def fill_together(
    ranks: Ranks, storage: Storage, manifest: Manifest, targets: Mapping[str, torch.Tensor], *, threads: int
) -> None:
    """
    Fill the *targets* of every rank, as `ckptman.pipeline.reading.fill` does; every byte is checked by who uses it.

    Collective, with a storage of the same kind on all ranks. Where it is distant, memory of `ROUND_NBYTES` for each
    rank of a host is shared by them meanwhile.

    Raises:
        CkptmanError: As `fill`; the same on every rank.
    """
    if not (ranks.are_many and isinstance(storage, Distant)):
        ranks.do(lambda: fill(storage, manifest, targets, threads=threads))
        return
    hosts = _hosts(ranks, manifest, targets)
    count = max((len(host.rounds) for host in hosts), default=0)
    mine = next((host for host in hosts if ranks.rank in host.members), None)
    done: frozenset[int] = frozenset()
    if count:
        with ExitStack() as stack:
            memory, does_share = _share(ranks, mine, hosts, stack)
            if does_share:
                share = _Share(ranks.rank, storage, manifest, targets, mine, memory)
                for number in range(count):
                    ranks.do(partial(share.fetch, number, threads))
                    ranks.do(partial(share.place, number))
                done = mine.tensors if mine is not None else done
    names = {manifest.tensors[number].name for number in done}
    rest = {name: target for name, target in targets.items() if name not in names}
    ranks.do(lambda: fill(storage, manifest, rest, threads=threads))


class _Share:
    """What one rank does in the rounds of its host; nothing where it shares with nobody."""

    def __init__(
        self,
        rank: int,
        storage: Storage,
        manifest: Manifest,
        targets: Mapping[str, torch.Tensor],
        host: _Host | None,
        memory: memoryview,
    ) -> None:
        self._host = host
        self._number = 0 if host is None else host.members.index(rank)
        self._storage = storage
        self._reader = CheckedReader(storage, manifest)
        self._manifest = manifest
        self._memory = memory
        self._placing = Placing(targets, manifest)
        self._checked: set[str] = set()

    def fetch(self, number: int, threads: int) -> None:
        """Fetch what falls to this rank in a round."""
        if self._host is None:
            return
        slots = [slot for slot in self._round(number) if slot.member == self._number]
        for slot in slots:
            if slot.file.path not in self._checked:
                self._reader.header(slot.file)
                self._checked.add(slot.file.path)
        Readers(
            [
                partial(self._reader.fetch, slot.file, slot.start, self._memory[slot.at : slot.at + slot.nbytes])
                for slot in slots
            ]
        ).run(threads)

    def place(self, number: int) -> None:
        """Copy and check all that this host has fetched in a round."""
        slots = self._round(number)
        held = _Held(self._memory, {(slot.file.path, slot.start): slot for slot in slots}, self._storage)
        reader = CheckedReader(held, self._manifest)
        for slot in slots:
            self._placing.piece(reader, slot.file, slot.piece)

    def _round(self, number: int) -> list[_Slot]:
        rounds = [] if self._host is None else self._host.rounds
        return rounds[number] if number < len(rounds) else []


class _Held:
    """The bytes of a round, as if they were read from the storage."""

    def __init__(self, memory: memoryview, slots: Mapping[tuple[str, int], _Slot], storage: Storage) -> None:
        self._memory = memory
        self._slots = slots
        self._storage = storage

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        slot = self._slots[key, start]
        into[:] = self._memory[slot.at : slot.at + slot.nbytes]
        return len(into)

    def size(self, key: str) -> int:
        return self._storage.size(key)


# ---------------------------------------------------------------------- who shares what


def _hosts(ranks: Ranks, manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> list[_Host]:
    """All hosts whose ranks share something, the same on every rank. Collective."""
    bits = bytearray(-(-len(manifest.tensors) // 8))
    for number, tensor in enumerate(manifest.tensors):
        if tensor.name in targets and not is_sharded(targets[tensor.name]):
            bits[number // 8] |= 1 << number % 8
    wish = msgspec.msgpack.encode(_Wish(_memory_name() if any(bits) else "", bytes(bits)))
    told = msgspec.msgpack.decode(ranks.conclude(lambda: wish, msgspec.msgpack.encode), type=list[bytes])
    wishes = [msgspec.msgpack.decode(one, type=_Wish) for one in told]
    members: dict[str, list[int]] = {}
    for rank, one in enumerate(wishes):
        if one.memory:
            members.setdefault(one.memory, []).append(rank)
    known: dict[tuple[int, bytes], _Host] = {}
    found = []
    for group in members.values():
        common = _common([wishes[rank].wanted for rank in group])
        host = known.get((len(group), common))
        if host is None:
            host = known[len(group), common] = _planned(manifest, tuple(group), common)
        if host.rounds:
            found.append(host._replace(members=tuple(group)))
    return found


def _common(wanted: Sequence[bytes]) -> bytes:
    bits = int.from_bytes(wanted[0], "little")
    for one in wanted[1:]:
        bits &= int.from_bytes(one, "little")
    return bits.to_bytes(len(wanted[0]), "little")


def _planned(manifest: Manifest, members: tuple[int, ...], common: bytes) -> _Host:
    numbers = [number for number in range(len(manifest.tensors)) if common[number // 8] >> number % 8 & 1]
    tensors = [manifest.tensors[number] for number in numbers]
    is_worth_it = len(members) > 1 and sum(tensor.nbytes for tensor in tensors) >= SMALLEST_NBYTES
    # a block of a foreign checkpoint may be larger than a round, or end within an element
    if not is_worth_it or manifest.block_nbytes > ROUND_NBYTES or manifest.block_nbytes % 16:
        return _Host(members, frozenset(), [])
    room = len(members) * ROUND_NBYTES
    rounds: list[list[_Slot]] = []
    at = room
    loads = [0] * len(members)
    for file, piece, start, nbytes in _cut(manifest, {tensor.name for tensor in tensors}):
        if at + nbytes > room:
            rounds.append([])
            at = 0
        member = loads.index(min(loads))
        loads[member] += nbytes
        rounds[-1].append(_Slot(file, piece, start, nbytes, at, member))
        at += nbytes
    return _Host(members, frozenset(numbers), rounds)


def _cut(manifest: Manifest, names: set[str]) -> Iterator[tuple[File, Piece, int, int]]:
    """Every piece of the tensors *names*: its file, where it begins there, and its size."""
    for file, parts in zip(manifest.files, parts_of(manifest, names), strict=True):
        for piece in pieces([part for part in parts if part.chunk.nbytes], manifest.block_nbytes):
            yield file, piece, piece.start, piece.stop - piece.start


# ---------------------------------------------------------------------- the memory


def _memory_name() -> str:
    """Equal for two processes only if a file that one of them makes in shared memory can be opened by the other."""
    try:
        return f"{socket.gethostname()} {_BOOT.read_text().strip()} {_MEMORY.stat().st_dev} {os.getuid()}"
    except (OSError, AttributeError):  # no Linux: others have it elsewhere, or not at all
        return ""


def _share(ranks: Ranks, mine: _Host | None, hosts: list[_Host], stack: ExitStack) -> tuple[memoryview, bool]:
    """
    The memory of this rank's host (empty where it has none), and whether all ranks of the job got theirs. Collective.

    The lowest rank of a host makes it, and takes its name down once the others have it.
    """
    lead = mine is not None and mine.members[0] == ranks.rank
    path = _made(len(mine.members) * ROUND_NBYTES, stack) if mine is not None and lead else ""
    began = time.monotonic()
    told = msgspec.msgpack.decode(ranks.conclude(path.encode, msgspec.msgpack.encode), type=list[bytes])
    seconds = time.monotonic() - began
    memory = None if mine is None else _opened(told[mine.members[0]].decode())
    is_ready = mine is None or memory is not None

    def all_ready(parts: list[bytes]) -> bytes:
        return b"yes" if all(parts) and seconds < SLOWEST_ROUND_S else b""

    does_share = ranks.conclude(lambda: b"yes" if is_ready else b"", all_ready) == b"yes"
    if path:
        _unlink(path)
    return memory or memoryview(b""), does_share


def _made(nbytes: int, stack: ExitStack) -> str:
    """The path of new memory, all of it there; empty where there is not so much."""
    path = _MEMORY / f"ckptman-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stack.callback(_unlink, str(path))
        try:
            os.posix_fallocate(descriptor, 0, nbytes)  # or touching it would kill the process
        finally:
            os.close(descriptor)
    except OSError:
        return ""
    return str(path)


def _opened(path: str) -> memoryview | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        held = mmap(descriptor, 0)
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
    return memoryview(held)


def _unlink(path: str) -> None:
    with suppress(OSError):
        Path(path).unlink()
