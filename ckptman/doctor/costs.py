"""What a storage costs: times, speed, space, and how far its clock is from ours."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

from ckptman.doctor.findings import Finding, duration, median_s
from ckptman.storage.base import Storage

TIMES = 15
SMALL = b"x" * 4096
PIECE_NBYTES = 16 << 20
LARGE_NBYTES = 256 << 20
LARGE_S = 1.0
"""The speed is that of a file of 16 to 256 MiB: as much as can be written in this time."""

INSTANT_S = 2e-5
"""No disk makes a file durable in less: whoever answers so quickly has promised in its place."""

SKEW_S = 60.0
LITTLE_NBYTES = 1 << 30

_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


@runtime_checkable
class Dated(Protocol):
    """A storage that tells when a key was written, by the clock of whoever keeps it."""

    def modified_at(self, key: str) -> datetime:
        """In UTC."""


def look(storage: Storage, folder: str) -> Iterator[Finding]:
    """The findings; *folder* is the examination's."""
    yield _durability(storage, folder)
    yield from _requests(storage, folder)
    yield from _speed(storage, folder)
    yield _space(storage)
    yield _clock(storage, folder)


def _durability(storage: Storage, folder: str) -> Finding:
    """A streamed file's commit is one fsync on a filesystem, one request elsewhere."""
    commits_s: list[float] = []

    def stream(number: int) -> None:
        with storage.open_new(f"{folder}/sync-{number}") as out:
            out.write(SMALL)
            began = time.perf_counter()
            out.commit()
            commits_s.append(time.perf_counter() - began)

    median_s(TIMES, stream)
    commit_s = sorted(commits_s)[TIMES // 2]
    figures = {"fsync_s": commit_s}
    kind = filesystem(storage.lock_path.parent) if storage.lock_path is not None else None
    where = f" on {kind}" if kind else ""
    if kind in _IN_MEMORY:
        what = f"this filesystem ({kind}) is memory: everything is gone when the machine restarts"
        return Finding(name="durability", verdict="bad", what=what, figures=figures)
    if storage.lock_path is not None and commit_s < INSTANT_S:
        what = f"an fsync{where} takes {duration(commit_s)}, too little for any disk: does anybody honour it?"
        return Finding(name="durability", verdict="unknown", what=what, figures=figures)
    what = f"making a small file durable{where} takes {duration(commit_s)}; only a power loss can prove that it is"
    return Finding(name="durability", verdict="ok", what=what, figures=figures)


def filesystem(path: Path) -> str | None:
    """The kind of the filesystem that *path*, or what exists above it, lies on; None where the system does not tell."""
    try:
        device = _existing(path).stat().st_dev
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if fields.split(" ")[2] == number:
            return rest.split(" ")[0]
    return None


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.exists())


def _requests(storage: Storage, folder: str) -> Iterator[Finding]:
    put_s = median_s(TIMES, lambda n: storage.create(f"{folder}/put-{n}", SMALL))
    get_s = median_s(TIMES, lambda n: storage.read(f"{folder}/put-{n}", limit=len(SMALL)))
    list_s = median_s(TIMES, lambda n: storage.listing(folder))
    delete_s = median_s(TIMES, lambda n: storage.delete([f"{folder}/put-{n}"]))
    figures = {"put_s": put_s, "get_s": get_s, "list_s": list_s, "delete_s": delete_s}
    told = ", ".join(f"{name.removesuffix('_s')} {duration(seconds)}" for name, seconds in figures.items())
    what = f"{told} (medians of 4 KiB keys; put is create-only, and durable with its name)"
    yield Finding(name="requests", verdict="ok", what=what, figures=figures)


def _speed(storage: Storage, folder: str) -> Iterator[Finding]:
    key, piece = f"{folder}/large", memoryview(os.urandom(PIECE_NBYTES))
    nbytes, began = 0, time.perf_counter()
    with storage.open_new(key) as out:
        while nbytes < LARGE_NBYTES and (not nbytes or time.perf_counter() - began < LARGE_S):
            out.write(piece)
            nbytes += len(piece)
    write_s = time.perf_counter() - began
    cached = _drop_from_cache(storage, key)
    into, began = memoryview(bytearray(PIECE_NBYTES)), time.perf_counter()
    for start in range(0, nbytes, PIECE_NBYTES):
        storage.read_into(key, start, into)
    read_s = time.perf_counter() - began
    for name, seconds, note in (("write", write_s, "until durable"), ("read", read_s, cached)):
        rate = nbytes / seconds
        what = f"{rate / 1e6:,.0f} MB/s ({nbytes >> 20} MiB in one stream, {note})"
        yield Finding(name=f"{name} speed", verdict="ok", what=what, figures={"bytes_per_s": rate, "nbytes": nbytes})


def _drop_from_cache(storage: Storage, key: str) -> str:
    """Ask the system to forget the file, so that reading it is reading; what to say of the figure."""
    if storage.lock_path is None or not hasattr(os, "posix_fadvise"):
        return "may come from a cache"
    with (storage.lock_path.parent / key).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "dropped from this machine's cache before"


def _space(storage: Storage) -> Finding:
    if storage.lock_path is None:
        return Finding(name="free space", verdict="unknown", what="not told by this storage")
    free = shutil.disk_usage(_existing(storage.lock_path.parent)).free
    what, figures = f"{free / 1e9:,.1f} GB", {"free_nbytes": free}
    if free < LITTLE_NBYTES:
        return Finding(name="free space", verdict="bad", what=f"{what}: a save may not fit", figures=figures)
    return Finding(name="free space", verdict="ok", what=what, figures=figures)


def _clock(storage: Storage, folder: str) -> Finding:
    if not isinstance(storage, Dated):
        return Finding(name="clock", verdict="unknown", what="this storage does not tell when a key was written")
    key, began = f"{folder}/clock", time.time()
    storage.create(key, b"x")
    ended, there = time.time(), storage.modified_at(key).timestamp()
    skew_s = there - min(max(there, began), ended)  # 0 if it lies between the two moments
    if abs(skew_s) < (0.05 if there % 1 else 1.0):  # filesystems count in milliseconds, object stores in seconds
        skew_s = 0.0
    figures = {"skew_s": skew_s}
    if abs(skew_s) > SKEW_S:
        what = f"the storage's clock is {duration(abs(skew_s))} {'ahead' if skew_s > 0 else 'behind'}: set one of both"
        return Finding(name="clock", verdict="bad", what=what, figures=figures)
    what = f"the storage's clock and ours differ by {duration(abs(skew_s))}" if skew_s else "agrees with ours"
    return Finding(name="clock", verdict="ok", what=what, figures=figures)
