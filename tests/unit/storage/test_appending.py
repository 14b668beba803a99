"""Large local files: the bytes are right in every way of writing, and the way is the one that suits the disk."""

from __future__ import annotations

import mmap
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest

from ckptman.storage.appending import ALIGNMENT, PIECE_NBYTES, SAMPLE_NBYTES, DiskTraits, is_aligned
from ckptman.storage.base import Buffer
from ckptman.storage.local import LocalStorage
from ckptman.storage.local_file import NewLocalFile
from ckptman.storage.system import SYSTEM, System
from ckptman.testing.faults import FaultySystem

MIB = 1 << 20
TRAITS = {
    "plain": DiskTraits(takes_direct=False, takes_advice=False),
    "write-back": DiskTraits(takes_direct=False),
    "buffered-is-faster": DiskTraits(is_buffered_faster=True),
    "direct": DiskTraits(is_buffered_faster=False),
    "direct-without-advice": DiskTraits(is_buffered_faster=False, takes_advice=False),
    "not-measured-yet": DiskTraits(),
}
WAYS = pytest.mark.parametrize("way", TRAITS)
RANDOM = random.Random(0).randbytes(36 * MIB)


def aligned(data: bytes, *, shift: int = 0) -> memoryview:
    """*data* in writable memory that begins *shift* bytes after a page does."""
    memory = memoryview(mmap.mmap(-1, len(data) + shift + 1))
    memory[shift : shift + len(data)] = data
    return memory[shift : shift + len(data)]


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on the disk of the temporary files; then one on tmpfs, which takes direct writes or not."""
    if request.param == "disk":
        yield tmp_path
        return
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def new_file(path: Path, way: str, *, system: System = SYSTEM) -> NewLocalFile:
    return NewLocalFile(str(path), path.name, key=path.name, traits=replace(TRAITS[way]), system=system)


def write(path: Path, way: str, *parts: Buffer, system: System = SYSTEM) -> bytes:
    """Write *parts* one after the other; what is in the file then."""
    with new_file(path, way, system=system) as file:
        for part in parts:
            file.write(part)
    return path.read_bytes()


# the bytes


@WAYS
def test_every_size(folder: Path, way: str) -> None:
    """One write of any size, around blocks, pieces and the least direct one, is read back."""
    sizes = [0, 1, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, PIECE_NBYTES - 4096, PIECE_NBYTES + 17, 35 * MIB + 5000]
    for size in sizes:
        assert write(folder / f"{size}", way, aligned(RANDOM[:size])) == RANDOM[:size], size


@WAYS
def test_every_sequence(folder: Path, way: str) -> None:
    """Slots, small writes between them, ends that fill no block, memory that is not aligned or not writable."""
    slot, other = RANDOM[: 2 * MIB], RANDOM[2 * MIB : 5 * MIB]
    sequences: dict[str, list[Buffer]] = {
        "slots": [aligned(slot), aligned(other), aligned(slot), aligned(slot[:12345])],
        "a header first": [b"header", aligned(slot), aligned(other)],
        "a header of one block": [aligned(slot[:4096]), aligned(slot), aligned(other)],
        "an end in the middle": [aligned(slot), aligned(other[:-1]), aligned(slot), b"x", aligned(slot)],
        "aligned again": [aligned(slot + b"x"), bytes(4095), aligned(slot)],
        "memory that is not aligned": [aligned(slot, shift=1), aligned(other, shift=512), aligned(slot)],
        "memory that is not writable": [slot, aligned(other).toreadonly(), aligned(slot)],
        "other buffers": [bytearray(slot), b"", memoryview(other)],
        "nothing": [],
    }
    for name, parts in sequences.items():
        assert write(folder / name, way, *parts) == b"".join(bytes(part) for part in parts), name


@WAYS
def test_memory_may_be_reused_at_once(tmp_path: Path, way: str) -> None:
    """What the caller does to its slot after write returned does not reach the file."""
    slot = aligned(RANDOM[:MIB])
    with new_file(tmp_path / "a", way) as file:
        for number in range(8):
            slot[:4096] = bytes([number]) * 4096
            slot[-4096:] = bytes([number]) * 4096
            file.write(slot)
    middle = RANDOM[4096 : MIB - 4096]
    expected = b"".join(bytes([number]) * 4096 + middle + bytes([number]) * 4096 for number in range(8))
    assert (tmp_path / "a").read_bytes() == expected


def test_what_is_aligned() -> None:
    """Offset, address and a worthwhile length; and memory of the caller's own."""
    slot = aligned(RANDOM[:MIB])
    assert is_aligned(slot, offset=0)
    assert is_aligned(slot, offset=5 * ALIGNMENT)
    assert not is_aligned(slot, offset=512)
    assert not is_aligned(slot[:-1], offset=0)
    assert not is_aligned(aligned(RANDOM[:MIB], shift=512), offset=0)
    assert not is_aligned(slot.toreadonly(), offset=0)
    assert not is_aligned(memoryview(b""), offset=0)


# the calls


class TakesDirect(System):
    """Takes what it is asked to write direct, wherever the file is."""

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        assert is_aligned(data, offset=file.tell()) or len(data) % ALIGNMENT == 0
        return file.write(data)


def calls_of(path: Path, way: str, *parts: Buffer) -> list[str]:
    system = FaultySystem(inner=TakesDirect())
    write(path, way, *parts, system=system)
    return [call.name for call in system.calls]


def test_which_calls_are_made(tmp_path: Path) -> None:
    """Direct as far as whole blocks go, the end buffered; else buffered, and written back early if it is large."""
    slots = [aligned(RANDOM[:MIB]), aligned(RANDOM[: 33 * MIB + 5])]
    start, end = ["open_new"], ["fsync", "close"]
    buffered = ["write", *["write"] * 3]
    advised = ["write", "begin_write_back"]
    direct = ["write_direct", *["write_direct"] * 3, "write"]
    assert calls_of(tmp_path / "a", "plain", *slots) == start + buffered + end
    assert calls_of(tmp_path / "b", "write-back", *slots) == start + advised * 4 + end
    assert calls_of(tmp_path / "c", "buffered-is-faster", *slots) == start + advised * 4 + end
    assert calls_of(tmp_path / "d", "direct", *slots) == start + direct + end
    assert calls_of(tmp_path / "e", "not-measured-yet", *slots) == start + direct + end
    for way in TRAITS:
        small: list[Buffer] = [b"header", aligned(RANDOM[: MIB - 1])]
        assert calls_of(tmp_path / f"small-{way}", way, *small) == start + ["write"] * 2 + end


@WAYS
def test_no_way_goes_without_fsync(tmp_path: Path, way: str) -> None:
    """The last of the calls that change bytes is followed by fsync, and then by close, large or small."""
    for number, parts in enumerate([[aligned(RANDOM[: 2 * MIB])], [aligned(RANDOM[: MIB + 7])], [b"small"], []]):
        assert calls_of(tmp_path / f"{number}", way, *parts)[-2:] == ["fsync", "close"]


def test_the_real_system(tmp_path: Path) -> None:
    """Here, direct writes work or are refused once; in both cases the descriptor is as before, and takes any length."""
    system = FaultySystem()
    storage = LocalStorage(tmp_path / "root", system=system)
    for key in ("a", "b"):
        with storage.open_new(key) as file:
            file.write(aligned(RANDOM[: 2 * MIB + 1]))
            file.write(b"any length")
        assert storage.read(key, limit=9 * MIB) == RANDOM[: 2 * MIB + 1] + b"any length"
    attempts = [call.name for call in system.calls].count("write_direct")
    assert attempts == (2 if takes_direct(tmp_path) else 1)


def takes_direct(folder: Path) -> bool:
    with open(folder / "probe", "xb", buffering=0) as file:
        try:
            return SYSTEM.write_direct(file, aligned(bytes(ALIGNMENT))) == ALIGNMENT
        except OSError:
            return False


# the choice


class Stopwatch(System):
    """A disk that takes *direct* and *buffered* seconds for a MiB, and keeps nothing. Buffered bytes wait for fsync."""

    def __init__(self, *, direct: float, buffered: float) -> None:
        self.calls: list[str] = []
        self._direct = direct
        self._buffered = buffered
        self._now = 0.0
        self._waiting = 0.0

    def seconds(self) -> float:
        return self._now

    def write(self, file: FileIO, data: memoryview) -> int:
        self.calls.append("buffered")
        self._waiting += len(data) / MIB * self._buffered
        return len(data)

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        self.calls.append("direct")
        self._now += len(data) / MIB * self._direct
        return len(data)

    def begin_write_back(self, file: FileIO, start: int, nbytes: int) -> None: ...

    def fsync(self, file: FileIO) -> None:
        self.calls.append("fsync")
        self._now += self._waiting
        self._waiting = 0.0


def calls_for_files(system: Stopwatch, root: Path, *slots: int) -> list[list[str]]:
    """The calls for files of so many slots each, written to one storage."""
    storage = LocalStorage(root, system=system)
    slot = memoryview(mmap.mmap(-1, PIECE_NBYTES))
    calls = []
    for number, count in enumerate(slots):
        system.calls.clear()
        with storage.open_new(f"{number}") as file:
            for _ in range(count):
                file.write(slot)
        calls.append([*system.calls])
    return calls


SAMPLE = SAMPLE_NBYTES // PIECE_NBYTES
MEASURING = ["direct"] * SAMPLE + ["fsync"] + ["buffered"] * SAMPLE + ["fsync"]


@pytest.mark.parametrize(
    ("direct", "buffered", "chosen"),
    [
        (1.0, 2.0, "direct"),
        (1.0, 1.0, "direct"),
        (1.0, 0.85, "direct"),  # not clearly faster
        (1.0, 0.75, "buffered"),
        (9.0, 1.0, "buffered"),
    ],
)
def test_the_faster_way_is_chosen(tmp_path: Path, direct: float, buffered: float, chosen: str) -> None:
    """A sample of each is timed, fsync included, in the first large file; its rest and all later ones are as chosen."""
    system = Stopwatch(direct=direct, buffered=buffered)
    first, second, third = calls_for_files(system, tmp_path / "root", 2 * SAMPLE + 3, 5, 40)
    assert first == [*MEASURING, *[chosen] * 3, "fsync"]
    assert second == [*[chosen] * 5, "fsync"]
    assert third == [*[chosen] * 40, "fsync"]


def test_a_file_that_ends_while_it_is_measured_teaches_nothing(tmp_path: Path) -> None:
    """The next one is measured from its beginning; so is each storage object for itself."""
    system = Stopwatch(direct=1.0, buffered=0.1)
    first, second, third = calls_for_files(system, tmp_path / "root", 2 * SAMPLE - 1, 2 * SAMPLE, 1)
    assert first == [*MEASURING[:-2], "fsync"]
    assert second == [*MEASURING, "fsync"]
    assert third == ["buffered", "fsync"]
    assert calls_for_files(system, tmp_path / "other", 1) == [["direct", "fsync"]]


def test_one_large_write_is_measured_in_pieces(tmp_path: Path) -> None:
    """A caller that hands over everything at once gets the same choice."""
    system = Stopwatch(direct=1.0, buffered=0.1)
    with LocalStorage(tmp_path / "root", system=system).open_new("a") as file:
        file.write(memoryview(mmap.mmap(-1, 2 * SAMPLE_NBYTES + 2 * PIECE_NBYTES)))
    assert system.calls == [*MEASURING, *["buffered"] * 2, "fsync"]


def test_a_disk_that_refuses_is_not_measured(tmp_path: Path) -> None:
    """There is nothing to choose, so nothing is fsynced for it."""

    class Refuses(Stopwatch):
        def write_direct(self, file: FileIO, data: memoryview) -> int:
            self.calls.append("refused")
            return 0

    system = Refuses(direct=1.0, buffered=1.0)
    assert calls_for_files(system, tmp_path / "root", 40, 2) == [
        ["refused", *["buffered"] * 40, "fsync"],
        ["buffered", "buffered", "fsync"],
    ]
