"""Which rank this process is, of which job: from what launchers put into the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ckptman.format.digest import sha256

# The launcher nearest to the process comes first: inside a SLURM job mpirun or torchrun may have started it.
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPI", "PMI_RANK", "PMI_SIZE"),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS"),
)

# The names of a job, each with what tells its restarts apart.
_JOBS = (
    ("TORCHELASTIC_RUN_ID", ("TORCHELASTIC_RESTART_COUNT",)),
    ("SLURM_JOB_ID", ("SLURM_STEP_ID", "SLURM_RESTART_COUNT")),
    ("PBS_JOBID", ()),
    ("LSB_JOBID", ()),
    ("JOB_ID", ("RESTARTED",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank of a job."""

    rank: int
    world_size: int
    job: str


def place(environ: Mapping[str, str], *, rank: int | None, world_size: int | None, job: str | None) -> Place:
    """
    What was given, completed from *environ*: torchrun, Open MPI, other MPIs, SLURM; for the job also PBS, LSF, Grid
    Engine.

    Raises:
        ValueError: Something is neither given nor there, or the numbers make no sense.
    """
    if (rank is None) != (world_size is None):
        raise ValueError("give both rank and world_size, or neither")
    if rank is None or world_size is None:
        rank, world_size = _numbers(environ)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, got rank {rank} of {world_size}")
    job = job or _job(environ)
    if not job:
        raise ValueError("the environment does not say which job this is: give job=…, the same on all of its ranks")
    return Place(rank=rank, world_size=world_size, job=job)


def _numbers(environ: Mapping[str, str]) -> tuple[int, int]:
    for launcher, rank, world_size in _LAUNCHERS:
        if rank in environ and world_size in environ:
            try:
                return int(environ[rank]), int(environ[world_size])
            except ValueError as error:
                raise ValueError(
                    f"{launcher} left {rank}={environ[rank]!r}, {world_size}={environ[world_size]!r}"
                ) from error
    names = ", ".join(f"{rank} and {world_size}" for _, rank, world_size in _LAUNCHERS)
    raise ValueError(f"the environment does not say which rank this is ({names}): give rank=… and world_size=…")


def _job(environ: Mapping[str, str]) -> str:
    for name, restarts in _JOBS:
        if environ.get(name):
            return "-".join([environ[name], *(environ[restart] for restart in restarts if restart in environ)])
    return ""


def folder_name(job: str) -> str:
    """A name for the folder of *job* that every storage takes: of two jobs, never the same."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", job)[:80]
    return f"job-{plain}" if plain == job else f"job-{plain}-{sha256(job.encode())[:12]}"
