"""
What every storage must do, as tests to inherit:

    class TestMyStorage(StorageContract):
        @pytest.fixture
        def storage(self) -> Storage:
            return MyStorage(...)          # empty, and this test's own

Passing says that the storage keeps its promises while it runs; that they hold through a kill or a power loss takes
`ckptman.testing.faults` and `ckptman.testing.power_loss`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptman.errors import FormatError, StorageError
from ckptman.storage.base import KeyExists, KeyMissing, NewFile, Storage, Stored

WRITERS = 8
MIB = 1 << 20

BAD_KEYS = (
    "", "/", "/etc/passwd", "a/", "a//b", ".", "..", "../x", "a/../b", "a/./b", "a/..", ".hidden",
    "a/.tmp-0123456789abcdef",
    "a\\b", "C:x", "c:/x", "a\0b", "a\nb", "a\x7fb", "nul", "NUL.json", "a/con", "com1.txt", "a.", "a ", "a /b", "a*",
    "a?", "\ud800", "x" * 513,
)  # fmt: skip


class StorageContract:
    """
    Inherit, and give it a fixture ``storage``: an empty storage for each test.

    Attributes:
        races: How often eight threads race for one key; fewer where a server answers slowly then.
    """

    races = 20

    # create

    @pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "small", "large"])
    def test_what_is_created_is_read_back(self, storage: Storage, data: bytes) -> None:
        """Every byte comes back, from any kind of buffer, and the size is right."""
        for key, buffer in (("a", data), ("f/b", bytearray(data)), ("f/g/c", memoryview(data))):
            storage.create(key, buffer)
            assert storage.read(key, limit=len(data)) == data
            assert storage.size(key) == len(data)

    def test_a_value_is_a_copy(self, storage: Storage) -> None:
        """What the caller does to its buffer afterwards does not reach the storage."""
        buffer = bytearray(b"before")
        storage.create("a", buffer)
        with storage.open_new("b") as file:
            file.write(buffer)
            buffer[:] = b"after!"
        assert storage.read("a", limit=9) == storage.read("b", limit=9) == b"before"

    @pytest.mark.parametrize("again", ["create", "open_new"])
    @pytest.mark.parametrize("first", ["create", "open_new"])
    def test_a_key_is_written_once(self, storage: Storage, first: str, again: str) -> None:
        """A second write under a key is refused, whichever way, even with the same bytes; the first value stays."""
        put(storage, first, "f/a", b"first")
        for data in (b"second", b"first"):
            with pytest.raises(KeyExists) as caught:
                put(storage, again, "f/a", data)
            assert caught.value.key == "f/a"
            assert "f/a" in str(caught.value)
        assert storage.read("f/a", limit=9) == b"first"
        assert storage.listing("") == [Stored(key="f/a", nbytes=5)]

    def test_one_of_many_racing_writers_wins(self, storage: Storage) -> None:
        """Of eight threads that create one key at once, one succeeds and seven get KeyExists, time and again."""
        for number in range(self.races):
            start = threading.Barrier(WRITERS)

            def race(writer: int, key: str = f"f/{number}", start: threading.Barrier = start) -> bool:
                start.wait()
                try:
                    storage.create(key, b"%d" % writer * 100)
                except KeyExists:
                    return False
                return True

            with ThreadPoolExecutor(WRITERS) as pool:
                won = list(pool.map(race, range(WRITERS)))
            assert won.count(True) == 1
            assert storage.read(f"f/{number}", limit=999) == b"%d" % won.index(True) * 100
        assert len(storage.listing("f")) == self.races

    def test_no_reader_sees_a_part(self, storage: Storage) -> None:
        """While large values are created, whoever sees a key reads all of it."""
        data = bytes(range(256)) * 1024
        enough = threading.Event()
        written: list[int] = []

        def write() -> None:
            while not enough.is_set() and len(written) < 400:  # a storage in memory writes faster than it lists
                storage.create(f"f/{len(written):06d}", data)
                written.append(len(data))

        def look(times: int = 20) -> None:
            while times:
                for stored in storage.listing("f")[-1:]:
                    assert stored.nbytes == len(data)
                    assert storage.read(stored.key, limit=len(data)) == data
                    times -= 1

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            try:
                look()
            finally:
                enough.set()
            writing.result()
        assert [stored.nbytes for stored in storage.listing("f")] == written

    # open_new

    def test_a_file_is_streamed(self, storage: Storage) -> None:
        """Many writes of all sizes come out as one value, longer than any single write."""
        parts = [b"", b"a", bytes(3 * MIB), b"end" * 1000]
        with storage.open_new("f/large") as file:
            for part in parts:
                file.write(part)
            file.write(memoryview(parts[2])[5:70])
        storage.persist(["f", ""])
        data = b"".join(parts) + bytes(65)
        assert storage.read("f/large", limit=len(data)) == data

    def test_an_empty_file_can_be_streamed(self, storage: Storage) -> None:
        """No write at all gives an empty value, which excludes like any other."""
        with storage.open_new("f/empty"):
            pass
        assert storage.read("f/empty", limit=0) == b""
        with pytest.raises(KeyExists):
            storage.create("f/empty", b"x")

    @pytest.mark.parametrize("how", ["abort", "exception"])
    def test_an_aborted_file_leaves_nothing(self, storage: Storage, how: str) -> None:
        """Nothing is listed or read, the key is free again, and aborting again is harmless."""
        file = storage.open_new("f/a")
        if how == "abort":
            file.write(b"some")
            file.abort()
        else:
            with pytest.raises(ZeroDivisionError):
                fail_while_writing(file, commits=False)
        file.abort()
        assert storage.listing("") == []
        with pytest.raises(KeyMissing):
            storage.size("f/a")
        storage.create("f/a", b"other")
        assert storage.read("f/a", limit=9) == b"other"

    def test_what_is_committed_stays(self, storage: Storage) -> None:
        """After a commit, abort changes nothing, and neither does an exception in the block; writing is refused."""
        file = storage.open_new("a")
        with pytest.raises(ZeroDivisionError):
            fail_while_writing(file, commits=True)
        file.abort()
        with pytest.raises(ValueError, match="committed or aborted"):
            file.write(b"more")
        with pytest.raises(ValueError, match="committed or aborted"):
            file.commit()
        assert storage.read("a", limit=9) == b"some"

    def test_a_key_that_is_being_written_is_taken(self, storage: Storage) -> None:
        """Of two files begun under one key, at most one is ever committed."""
        with storage.open_new("a") as first:
            first.write(b"first")
            with pytest.raises(KeyExists), storage.open_new("a") as second:
                second.write(b"second")
        assert storage.read("a", limit=9) == b"first"

    # read

    def test_ranges(self, storage: Storage) -> None:
        """A range is filled as far as the value goes, and what lies beyond stays as it was."""
        storage.create("a", b"0123456789")
        for start, length, expected in (
            (0, 10, b"0123456789"),
            (3, 4, b"3456"),
            (8, 5, b"89"),
            (10, 3, b""),
            (99, 3, b""),
        ):
            into = bytearray(b"-" * length)
            assert storage.read_into("a", start, memoryview(into)) == len(expected)
            assert into == expected.ljust(length, b"-")
        assert storage.read_into("a", 2, memoryview(bytearray())) == 0

    def test_a_value_above_the_limit_is_refused(self, storage: Storage) -> None:
        """One byte too many is a StorageError that names the key and both numbers, not KeyMissing."""
        storage.create("f/a", bytes(1001))
        assert len(storage.read("f/a", limit=1001)) == 1001
        with pytest.raises(StorageError, match=r"f/a.*1001.*1000") as caught:
            storage.read("f/a", limit=1000)
        assert not isinstance(caught.value, (KeyMissing, KeyExists))

    @pytest.mark.parametrize("key", ["a", "f/b", "f/g/c", "g/a"])
    def test_missing_keys(self, storage: Storage, key: str) -> None:
        """Reading what is not there is KeyMissing, with the key, in a folder that exists or not."""
        storage.create("f/a", b"x")
        reads: tuple[Callable[[], object], ...] = (
            lambda: storage.read(key, limit=9),
            lambda: storage.size(key),
            lambda: storage.read_into(key, 0, memoryview(bytearray(3))),
        )
        for read in reads:
            with pytest.raises(KeyMissing) as caught:
                read()
            assert caught.value.key == key
            assert key in str(caught.value)

    def test_many_threads_read(self, storage: Storage) -> None:
        """Concurrent reads of one value do not disturb each other."""
        data = b"".join(b"%07d " % number for number in range(50_000))
        storage.create("a", data)

        def part(number: int) -> bool:
            into = bytearray(8000)
            start = number * 997 % (len(data) - 8000)
            return storage.read_into("a", start, memoryview(into)) == 8000 and into == data[start : start + 8000]

        with ThreadPoolExecutor(WRITERS) as pool:
            assert all(pool.map(part, range(400)))

    # listing and folders

    def test_listings(self, storage: Storage) -> None:
        """A listing has everything below a folder, sorted, with sizes, and nothing of folders that are named alike."""
        for key in ("f/b", "f/a", "f/g/c", "f2/a", "f.x/a", "top", "f/b.json"):
            storage.create(key, key.encode())
        assert [stored.key for stored in storage.listing("f")] == ["f/a", "f/b", "f/b.json", "f/g/c"]
        assert [stored.key for stored in storage.listing("f/g")] == ["f/g/c"]
        everything = storage.listing("")
        assert [stored.key for stored in everything] == sorted(stored.key for stored in everything)
        assert {stored.key: stored.nbytes for stored in everything}["f/b.json"] == 8
        assert len(everything) == 7
        assert storage.folders() == ["f", "f.x", "f2"]

    def test_listings_are_fresh(self, storage: Storage) -> None:
        """What was created or deleted a moment ago is listed or not, though the folder was listed just before."""
        for number in range(30):
            assert len(storage.listing("f")) == number
            storage.create(f"f/{number:03d}", b"x")
        assert len(storage.listing("f")) == 30
        for number in range(30):
            storage.delete([f"f/{number:03d}"])
            assert len(storage.listing("f")) == 29 - number

    def test_reading_creates_nothing(self, storage: Storage) -> None:
        """An empty storage lists as empty, and still does after everything that only looks."""
        for _ in range(2):
            assert storage.listing("") == []
            assert storage.listing("f") == []
            assert storage.folders() == []
            storage.delete(["f/a"])
            storage.remove_temporaries("f")
            with pytest.raises(KeyMissing):
                storage.read("f/a", limit=9)

    # delete

    def test_deleting(self, storage: Storage) -> None:
        """What is named goes, missing keys are no error, all else stays; what was emptied can be filled again."""
        for key in ("f/a", "f/b", "g/a", "g/h/b", "top"):
            storage.create(key, b"x")
        storage.delete(["g/a", "nowhere/at/all", "g/h/b", "f/a", "g/a"])
        assert [stored.key for stored in storage.listing("")] == ["f/b", "top"]
        assert [folder for folder in storage.folders() if storage.listing(folder)] == ["f"]
        storage.create("g/a", b"again")
        storage.persist(["g", ""])
        assert storage.read("g/a", limit=9) == b"again"

    def test_an_emptied_folder_is_gone(self, storage: Storage) -> None:
        """A folder whose last key was deleted is not named any more."""
        storage.create("f/a", b"x")
        storage.create("g/a", b"x")
        storage.delete(["g/a"])
        assert storage.folders() == ["f"]

    def test_keys_are_deleted_in_their_order(self, storage: Storage) -> None:
        """When a later key is asked for, the earlier ones are gone already."""
        keys = ["f/c", "f/a", "f/d", "f/b"]
        for key in keys:
            storage.create(key, b"x")
        left: list[list[str]] = []

        def watched() -> list[str]:
            left.append([stored.key for stored in storage.listing("f")])
            return keys

        storage.delete(key for key in keys if watched())
        assert left == [
            ["f/a", "f/b", "f/c", "f/d"],
            ["f/a", "f/b", "f/d"],
            ["f/b", "f/d"],
            ["f/b"],
        ]

    def test_nothing_finished_is_temporary(self, storage: Storage) -> None:
        """Cleaning up a folder removes nothing that has a key."""
        storage.create("f/a", b"x")
        with storage.open_new("f/b") as file:
            file.write(b"y")
        storage.remove_temporaries("f")
        storage.remove_temporaries("")
        assert [stored.key for stored in storage.listing("")] == ["f/a", "f/b"]

    # the rest

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_keys_are_checked(self, storage: Storage, key: str) -> None:
        """A key that could leave the root, or that some system cannot store, is refused by every method."""
        calls: list[Callable[[], object]] = [
            lambda: storage.create(key, b"x"),
            lambda: storage.open_new(key),
            lambda: storage.read(key, limit=9),
            lambda: storage.read_into(key, 0, memoryview(bytearray(1))),
            lambda: storage.size(key),
            lambda: storage.delete([key]),
        ]
        if key:  # as a folder, the empty name is the root
            calls += [lambda: storage.listing(key)]
        for call in calls:
            with pytest.raises(FormatError):
                call()
        assert storage.listing("") == []

    def test_it_says_what_it_is(self, storage: Storage) -> None:
        """It is a `Storage`, with a URL to read and an identity that stays."""
        assert isinstance(storage, Storage)
        assert storage.url
        assert storage.identity == storage.identity != ""


def fail_while_writing(file: NewFile, *, commits: bool) -> None:
    """Use *file* in a block that raises ZeroDivisionError after ``b"some"`` was written, or committed."""
    with file:
        file.write(b"some")
        if commits:
            file.commit()
        raise ZeroDivisionError


def put(storage: Storage, how: str, key: str, data: bytes) -> None:
    """Store *data* by ``create`` or by ``open_new``."""
    if how == "create":
        storage.create(key, data)
    else:
        with storage.open_new(key) as file:
            file.write(data)
