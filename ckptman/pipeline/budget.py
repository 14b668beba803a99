"""How much a save may take of the machine: memory, threads, saves at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_UNKNOWN_NBYTES = 4 << 30
"""What is taken for free where the system does not say (macOS, Windows)."""

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """
    What saving and restoring may take of the machine.

    Attributes:
        host_nbytes: Host memory for staging, in bytes; None: half of what the machine, or the process's cgroup, has
            free when it is needed. A state that does not fit is saved all the same, through a ring of this size, and
            then ``save`` waits until all but the last of it is written. At least one slot of 16 MiB is taken.
        io_threads: Threads that read at a time during a restore. Ranks of one host that read files share them, or the
            host's cores if those are more.
        in_flight: Saves that may be under way at a time. When one more is asked for, ``save`` waits, and the wait
            counts in ``stall_s``. They share ``host_nbytes``. With several ranks it is 1, and more is
            refused.
        prefault: Take the staging memory in the background as soon as the state is known, so that the first save
            stalls no longer than the others. Otherwise none is taken before it is needed.

    Raises:
        ValueError: A number is too small.
    """

    host_nbytes: int | None = None
    io_threads: int = 4
    in_flight: int = 1
    prefault: bool = True

    def __post_init__(self) -> None:
        for name in ("host_nbytes", "io_threads", "in_flight"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")


def reading_threads(io_threads: int, ranks_here: int) -> int:
    """
    How many of its *io_threads* each of *ranks_here* ranks on this host uses to read files.

    Together they are no more than one rank would start alone, or than there are cores, whichever is more: beyond that
    they take the disk and the cores from each other. Four ranks of one thread each read 400 MiB in three quarters of
    the time, with two thirds of the CPU seconds, that four of four threads took (two cores, nothing cached).
    """
    return max(1, min(io_threads, max(io_threads, os.cpu_count() or 1) // ranks_here))


def free_nbytes(*, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """
    Host memory that could be taken now, in bytes: of the machine, and of every cgroup that this process is in.

    Linux only; elsewhere, and where nothing can be read, 4 GiB. No promise: others may take it first.
    """
    found = [*_machine(proc), *_groups(proc, cgroups)]
    return max(0, min(found)) if found else _UNKNOWN_NBYTES


def _machine(proc: Path) -> Iterator[int]:
    with suppress(OSError):
        text = (proc / "meminfo").read_text()
        if match := re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE):
            yield int(match[1]) * 1024


def _groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """What is left below the limit of each memory cgroup of this process, from its own up to the root; v2 and v1."""
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from _left(cgroups, path, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                yield from _left(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _left(mount: Path, path: str, limit: str, used: str) -> Iterator[int]:
    # Within a container the path may be the host's, and its own group is mounted at the top: both are looked at.
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # "max" is no number, and no limit
            yield int((folder / limit).read_text()) - int((folder / used).read_text())
        if folder == mount:
            return
