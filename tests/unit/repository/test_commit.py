"""The commit protocol on the perfect storage, with every bad thing that a storage may do to it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec
import pytest

from ckptman.errors import CommitUnknown, Fenced, FormatError, StorageError
from ckptman.format.catalog import Entry, Record, write_record
from ckptman.format.names import record_key
from ckptman.repository.commit import commit
from ckptman.repository.head import read_head, read_history, record_numbers
from ckptman.repository.ownership import Ownership, take
from ckptman.repository.sweep import KEPT_RECORDS
from ckptman.storage.base import Buffer, KeyExists, NotDurable, Stored
from ckptman.storage.memory import MemoryStorage


def entry(step: int) -> Entry:
    return Entry(
        step=step,
        attempt=f"step-{step:012d}.w0001.{step:08x}",
        manifest="0" * 64,
        after=step,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        nbytes=0,
        new_nbytes=0,
        world_size=1,
        components=(),
    )


def adding(step: int):  # type: ignore[no-untyped-def]
    return lambda entries: (*(e for e in entries if e.step != step), entry(step))


def own(storage: MemoryStorage) -> Ownership:
    return take(storage, timeout_s=0)


def steps(storage: MemoryStorage) -> list[int]:
    record = read_head(storage).record
    assert record is not None
    return [e.step for e in record.checkpoints]


class Liar(MemoryStorage):
    """Fails ``create`` of records once, before or after it took effect, and perhaps the read that follows."""

    def __init__(self) -> None:
        super().__init__("liar")
        self.error: StorageError | None = None
        self.landed = False
        self.mute = False

    def create(self, key: str, data: Buffer) -> None:
        error, self.error = self.error, None
        if error is None:
            return super().create(key, data)
        if self.landed:
            super().create(key, data)
        self.muted = self.mute
        raise error

    muted = False
    stuck = False

    def persist(self, folders: Iterable[str]) -> None:
        if self.stuck:
            raise StorageError("fsync failed")

    def read(self, key: str, *, limit: int) -> bytes:
        if self.muted and key.startswith("catalog/"):
            self.muted = False
            raise StorageError("unreachable")
        return super().read(key, limit=limit)


def test_a_change_becomes_the_newest_record() -> None:
    """Each commit adds one record that names its predecessor's digest and the writer."""
    storage = MemoryStorage("a")
    owner = own(storage)
    owner.commit(adding(1), "save step 1")
    owner.commit(adding(2), "save step 2")
    history = [record for _, record in read_history(storage)]
    assert [record.number for record in history if record] == [1, 2, 3]
    assert steps(storage) == [1, 2]
    assert all(isinstance(r, Record) and r.writer.id == owner.writer.id for r in history)


@pytest.mark.parametrize("error", [StorageError("timeout"), KeyExists("taken")], ids=["timeout", "exists"])
def test_a_lost_answer_is_recognised_by_its_nonce(error: StorageError) -> None:
    """A put that landed although its answer said otherwise counts, exactly once."""
    storage = Liar()
    owner = own(storage)
    storage.error, storage.landed = error, True
    owner.commit(adding(1), "save step 1")
    assert steps(storage) == [1]
    assert record_numbers(storage) == [1, 2]


def test_a_put_that_did_not_land_is_an_error_and_the_next_commit_works() -> None:
    """Nothing of the change exists after a StorageError."""
    storage = Liar()
    owner = own(storage)
    storage.error, storage.landed = StorageError("refused"), False
    with pytest.raises(StorageError, match="refused"):
        owner.commit(adding(1), "save step 1")
    assert steps(storage) == []
    owner.commit(adding(2), "save step 2")
    assert steps(storage) == [2]


@pytest.mark.parametrize("landed", [False, True])
def test_not_knowing_is_said(landed: bool) -> None:
    """Where the read after a failed put fails too, the answer is neither yes nor no; the next commit finds out."""
    storage = Liar()
    owner = own(storage)
    storage.error, storage.landed, storage.mute = StorageError("timeout"), landed, True
    with pytest.raises(CommitUnknown, match="is there or not"):
        owner.commit(adding(1), "save step 1")
    owner.commit(adding(2), "save step 2")
    assert steps(storage) == ([1, 2] if landed else [2])


def test_a_landed_put_counts_only_once_its_name_is_durable() -> None:
    """Where the name cannot be made durable after a lost answer, nothing is acknowledged."""
    storage = Liar()
    owner = own(storage)
    storage.error, storage.landed, storage.stuck = StorageError("timeout"), True, True
    with pytest.raises(CommitUnknown, match="power loss"):
        owner.commit(adding(1), "save step 1")


def test_visible_but_not_durable_is_unknown() -> None:
    """A record whose directory could not be fsynced is never acknowledged."""
    storage = Liar()
    owner = own(storage)
    storage.error, storage.landed = NotDurable("fsync failed"), True
    with pytest.raises(CommitUnknown, match="power loss"):
        owner.commit(adding(1), "save step 1")


def test_an_overtaken_writer_is_fenced() -> None:
    """After another owner's first record, the earlier one commits nothing, now and later."""
    storage = MemoryStorage("a")
    first = own(storage)
    second = own(storage)
    for _ in range(2):
        with pytest.raises(Fenced):
            first.commit(adding(1), "save step 1")
    second.commit(adding(2), "save step 2")
    assert steps(storage) == [2]
    assert second.writer.epoch == first.writer.epoch + 1


def test_a_writer_in_another_process_is_fenced_by_the_catalog_alone() -> None:
    """Without the courtesy of the registry (another process), the newest record's writer decides."""
    storage = MemoryStorage("a")
    first = own(storage)
    stranger = msgspec.structs.replace(first.writer, epoch=2, id="another", host="elsewhere")
    commit(storage, tuple, root=first.root, what="take over", writer_for=lambda head: stranger)
    with pytest.raises(Fenced, match="elsewhere"):
        first.commit(adding(1), "save step 1")
    assert steps(storage) == []


def test_a_sleeper_below_swept_records_removes_its_record() -> None:
    """A put into a number that was swept long ago is found out, undone and fenced."""
    storage = MemoryStorage("a")
    first = own(storage)
    stranger = msgspec.structs.replace(first.writer, epoch=2, id="another")

    def slept(head: object) -> object:
        if not overtaken:
            overtaken.append(True)
            for _ in range(3):
                commit(storage, tuple, root=first.root, what="go on", writer_for=lambda head: stranger)
            storage.delete([record_key(1), record_key(2), record_key(3)])
        return first.writer

    overtaken: list[bool] = []
    with pytest.raises(Fenced, match="slept"):
        commit(storage, adding(1), root=first.root, what="save step 1", writer_for=slept)  # type: ignore[arg-type]
    assert record_numbers(storage) == [4]
    assert steps(storage) == []


def test_old_records_are_swept() -> None:
    """The newest 100 stay."""
    storage = MemoryStorage("a")
    owner = own(storage)
    for step in range(KEPT_RECORDS + 20):
        owner.commit(adding(step), "save")
    numbers = record_numbers(storage)
    assert len(numbers) == KEPT_RECORDS
    assert numbers[-1] == KEPT_RECORDS + 21


def test_a_commit_lists_the_catalog_twice() -> None:
    """Before its put and after it, for the sake of fencing; to find what became old it need not look."""

    class Counting(MemoryStorage):
        listings = 0

        def listing(self, folder: str) -> list[Stored]:
            self.listings += 1
            return super().listing(folder)

    storage = Counting("a")
    owner = own(storage)
    for step in range(KEPT_RECORDS + 2):
        before = storage.listings
        owner.commit(adding(step), "save")
        assert storage.listings == before + 2


def test_what_an_earlier_writer_could_not_sweep_goes_when_the_next_one_begins() -> None:
    """A writer deletes what becomes old under it; the next one looks for what stayed."""

    class Stubborn(MemoryStorage):
        refuses = True

        def delete(self, keys: Iterable[str]) -> None:
            if self.refuses:
                raise StorageError("not now")
            super().delete(keys)

    storage = Stubborn("a")
    owner = own(storage)
    for step in range(KEPT_RECORDS + 20):
        owner.commit(adding(step), "save")
    assert len(record_numbers(storage)) == KEPT_RECORDS + 21
    storage.refuses = False
    own(storage)
    assert len(record_numbers(storage)) == KEPT_RECORDS


def test_a_known_record_counts_only_while_its_bytes_are_there() -> None:
    """The writer does not check again what it wrote; what somebody else put in its place it reads."""
    storage = MemoryStorage("a")
    owner = own(storage)
    owner.commit(adding(1), "save step 1")
    other = write_record(msgspec.structs.replace(owner.newest, checkpoints=(entry(7),)))
    storage.delete([record_key(2)])
    storage.create(record_key(2), other)
    owner.commit(adding(2), "save step 2")
    assert steps(storage) == [7, 2]


def test_racing_commits_of_one_writer_lose_nothing() -> None:
    """Eight threads, twenty commits each: all 160 changes are part of the end."""
    storage = MemoryStorage("a")
    owner = own(storage)
    threads = [
        threading.Thread(target=lambda n=n: [owner.commit(adding(n * 100 + i), "save") for i in range(20)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(steps(storage)) == 160


def test_a_root_with_attempts_but_no_record_is_damaged_not_new() -> None:
    """Taking it is refused with a pointer to repair, so that nothing is swept."""
    storage = MemoryStorage("a")
    storage.create(f"{entry(1).attempt}/manifest.json", b"{}")
    with pytest.raises(FormatError, match="repair"):
        own(storage)


def test_a_foreign_file_in_the_catalog_is_ignored() -> None:
    """Only names of records count."""
    storage = MemoryStorage("a")
    owner = own(storage)
    storage.create("catalog/README", b"hello")
    storage.create("catalog/999.json", b"hello")
    owner.commit(adding(1), "save step 1")
    assert record_numbers(storage) == [1, 2]
