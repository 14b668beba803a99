"""
Ranks that share nothing but a storage.

They find each other in the folder ``ranks/JOB`` of it. A job may be started again under the same name while files of
its predecessor lie there still, or even while processes of it live on. So:

1. Rank 0 makes a session under a name that nobody ever used, and takes down those of earlier rank 0s. (A predecessor
   that lives on loses its board, and says so.)
2. Every other rank joins each session that it finds, with a name of its own that nobody ever used.
3. Once all have joined, rank 0 puts up who is in: for each rank one name. If several joined as one rank, one of them
   is in, and the others go on looking.
4. A rank is in the session whose list names it. A list that an earlier rank 0 left behind names others.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ckptman.coordination.coordinator import RankLost
from ckptman.coordination.meeting import SILENCE_S, Meeting
from ckptman.format.names import check_component
from ckptman.storage.base import KeyMissing, Storage
from ckptman.storage.opening import open_storage

FOLDER = "ranks"
MAX_VALUE_NBYTES = 1 << 31

_LAUNCHERS = (  # who started us: the variables for rank, world size, and what names the job
    ("RANK", "WORLD_SIZE", ("TORCHELASTIC_RUN_ID",)),
    ("SLURM_PROCID", "SLURM_NTASKS", ("SLURM_JOB_ID", "SLURM_STEP_ID")),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_MCA_ess_base_jobid",)),
    ("PMI_RANK", "PMI_SIZE", ("PMI_ID", "SLURM_JOB_ID")),
)


class StorageBoard:
    """A board in a folder of a storage. All is found by listing, which is fresh where asking for a name is not."""

    longest_pause_s = 0.2

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage = storage
        self._folder = folder
        self._last_beat: str | None = None

    def put(self, key: str, value: bytes) -> None:
        """Put *value* up."""
        self._storage.create(f"{self._folder}/{key}", value)

    def find(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Of *keys* those that are there, with their values."""
        there = {stored.key for stored in self._storage.listing(self._folder)}
        found = {}
        for key in keys:
            name = f"{self._folder}/{key}"
            if name in there:
                found[key] = self._storage.read(name, limit=MAX_VALUE_NBYTES)
        return found

    def delete(self, keys: Iterable[str]) -> None:
        """Take *keys* down."""
        self._storage.delete([f"{self._folder}/{key}" for key in keys])

    def beat(self, rank: int, count: int) -> None:
        """Show that *rank* lives: a new file for each beat, since none is ever overwritten."""
        last, self._last_beat = self._last_beat, f"{self._folder}/beat/{rank}/{count}"
        self._storage.create(self._last_beat, b"")
        if last is not None:
            self._storage.delete([last])

    def beats(self, ranks: Sequence[int]) -> Mapping[int, int]:
        """The last count of each of *ranks*."""
        latest: dict[int, int] = {}
        for stored in self._storage.listing(f"{self._folder}/beat"):
            rank, count = map(int, stored.key.split("/")[-2:])
            latest[rank] = max(latest.get(rank, 0), count)
        return {rank: latest[rank] for rank in ranks if rank in latest}

    def clear(self) -> None:
        """Take everything down."""
        self._storage.delete([stored.key for stored in self._storage.listing(self._folder)])


class Files(Meeting):
    """
    Ranks that were not started by ``torch.distributed``, or do not use it, and that share a storage.

    Making one waits until all ranks have made theirs. Not needed where ``torch.distributed`` is initialised.

    Args:
        root: The storage that all share: best the root of the checkpoints itself.
        rank: Which rank this is. None: what torchrun, SLURM, Open MPI or another MPI says in the environment.
        world_size: How many there are. None: as for ``rank``.
        job: A name for the job that no other job uses on this root at the same time. None: as for ``rank``.
        timeout_s: How long to wait for the others.
        silence_s: After how many seconds without a sign of life a rank is given up.

    Raises:
        ValueError: Neither arguments nor environment say which rank this is; or they make no sense.
        RankLost: Not all came in time; the text names those that did not.
        StorageError: The storage failed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        job: str | None = None,
        timeout_s: float = 600.0,
        silence_s: float = SILENCE_S,
    ) -> None:
        me = _who(os.environ, rank, world_size, job)
        storage = open_storage(root)
        folder = f"{FOLDER}/{check_component(me.job)}"
        deadline = time.monotonic() + timeout_s
        session = _lead(storage, folder, me, deadline) if me.rank == 0 else _join(storage, folder, me, deadline)
        self._files = StorageBoard(storage, f"{folder}/{session}/board")
        self._session = StorageBoard(storage, f"{folder}/{session}")
        super().__init__(self._files, me.rank, me.world_size, silence_s=silence_s)

    def close(self) -> None:
        """Leave; rank 0 then removes what the session left on the storage."""
        is_open = self._pulse is not None
        super().close()
        if is_open and self.rank == 0 and os.getpid() == self._pid:
            self._session.clear()


class _Me(msgspec.Struct, frozen=True):
    rank: int
    world_size: int
    job: str


def _who(environment: Mapping[str, str], rank: int | None, world_size: int | None, job: str | None) -> _Me:
    for rank_name, size_name, job_names in _LAUNCHERS:
        if rank_name in environment and size_name in environment:
            rank = int(environment[rank_name]) if rank is None else rank
            world_size = int(environment[size_name]) if world_size is None else world_size
            named = "-".join(environment[name] for name in job_names if name in environment)
            job = named or None if job is None else job
            break
    if rank is None or world_size is None or job is None:
        lacking = [name for name, value in (("rank", rank), ("world_size", world_size), ("job", job)) if value is None]
        raise ValueError(
            f"nobody says {', '.join(lacking)}: no torchrun, SLURM or MPI has started this process, so give them: "
            "Files(root, rank=0, world_size=4, job='a-name-of-this-job')"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to {world_size - 1}, got {rank}")
    return _Me(rank, world_size, job)


def _lead(storage: Storage, folder: str, me: _Me, deadline: float) -> str:
    """Make a session, and wait until all have joined it; return its name."""
    session = secrets.token_hex(8)
    storage.delete([stored.key for stored in storage.listing(folder)])
    board = StorageBoard(storage, f"{folder}/{session}")
    board.put("open", b"")
    members: dict[int, str] = {}
    while len(members) < me.world_size - 1:
        for stored in storage.listing(f"{folder}/{session}/join"):
            rank, name = stored.key.split("/")[-2:]
            members[int(rank)] = name
        if len(members) < me.world_size - 1:
            missing = [str(rank) for rank in range(1, me.world_size) if rank not in members]
            _pause(deadline, f"of the job {me.job!r}, these ranks did not come in time: {', '.join(missing)}")
    board.put("members", msgspec.json.encode(members))
    return session


def _join(storage: Storage, folder: str, me: _Me, deadline: float) -> str:
    """Join every session there is, until one takes us; return its name."""
    name = secrets.token_hex(8)
    joined: set[str] = set()
    while True:
        there = {stored.key for stored in storage.listing(folder)}
        for session in sorted({key.split("/")[2] for key in there}):
            root = f"{folder}/{session}"
            if f"{root}/open" in there and session not in joined:
                storage.create(f"{root}/join/{me.rank}/{name}", b"")
                joined.add(session)
            if session in joined and f"{root}/members" in there and _names(storage, f"{root}/members", me, name):
                return session
        _pause(deadline, f"rank 0 of the job {me.job!r} did not let rank {me.rank} in: was it started?", rank=0)


def _names(storage: Storage, key: str, me: _Me, name: str) -> bool:
    try:
        members = msgspec.json.decode(storage.read(key, limit=MAX_VALUE_NBYTES), type=dict[int, str])
    except KeyMissing:
        return False  # a newer rank 0 took the session down
    return members.get(me.rank) == name


def _pause(deadline: float, why: str, *, rank: int | None = None) -> None:
    if time.monotonic() > deadline:
        raise RankLost(why, rank=rank)
    time.sleep(0.05)
