"""What an object storage makes of the world outside: errors that pass and that stay, secrets, stores that overwrite."""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ckptman.errors import StorageError
from ckptman.storage import driver
from ckptman.storage.base import KeyExists, KeyMissing
from ckptman.storage.foreign import is_transient, ours, secrets_of
from ckptman.storage.object import ObjectStorage
from ckptman.storage.retry import Retry


class Answer(Exception):
    """An error as clients raise them: the status is an attribute, the text is anything."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status


class Store(MemoryFileSystem):  # type: ignore[misc]
    """A filesystem whose create-only put keeps its word, and that fails as often as it is told to."""

    cachable = False

    def __init__(self) -> None:
        super().__init__(global_store=False)
        self.failures: list[Exception] = []

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        if self.failures:
            raise self.failures.pop()
        file = MemoryFile(self, path, value)
        if mode == "create" and self.store.setdefault(path, file) is not file:
            raise FileExistsError(path)


def storage_on(filesystem: MemoryFileSystem, **more: object) -> ObjectStorage:
    retry = Retry(sleep=lambda seconds: None)
    return ObjectStorage("memory://x", filesystem=lambda: filesystem, retry=retry, **more)  # type: ignore[arg-type]


# trying again


def test_it_tries_again_ever_slower_and_not_for_ever() -> None:
    """Five tries; each wait lies between half of and all of a doubling time."""
    waits: list[float] = []
    luck = iter([0.0, 1.0, 0.0, 1.0])
    retry = Retry(sleep=waits.append, clock=lambda: 0.0, random=lambda: next(luck))
    with pytest.raises(ConnectionError):
        retry(failing(ConnectionError()), is_transient=is_transient)
    assert waits == [0.05, 0.2, 0.2, 0.8]


def test_no_try_begins_after_the_patience() -> None:
    """A client that takes a minute to fail is not asked a second time."""
    now, tries = [0.0], [0]

    def slow() -> None:
        now[0] += 61
        tries[0] += 1
        raise TimeoutError

    with pytest.raises(TimeoutError):
        Retry(sleep=lambda seconds: None, clock=lambda: now[0])(slow, is_transient=is_transient)
    assert tries == [1]


def test_what_will_not_pass_is_not_repeated() -> None:
    """Nor is Ctrl-C."""
    for error in (Answer(403), ValueError(), KeyboardInterrupt()):
        tries = [0]
        with pytest.raises(type(error)):
            Retry(sleep=lambda seconds: None)(failing(error, tries), is_transient=is_transient)
        assert tries == [1]


def failing(error: BaseException, tries: list[int] | None = None) -> Callable[[], None]:
    def call() -> None:
        if tries is not None:
            tries[0] += 1
        raise error

    return call


def test_a_put_that_fails_in_passing_is_repeated() -> None:
    """429 and 503 and a cut connection, in a row; a fifth failure is the last."""
    filesystem = Store()
    storage = storage_on(filesystem, single_writer=True)
    filesystem.failures = [Answer(503), Answer(429), ConnectionResetError(), TimeoutError()]
    storage.create("a", b"x")
    filesystem.failures = [Answer(503)] * 5
    with pytest.raises(StorageError, match="also when asked again"):
        storage.create("b", b"x")


@pytest.mark.parametrize("refusal", [Answer(403), PermissionError("expired"), ValueError("?")], ids=repr)
def test_a_refusal_after_a_lost_answer_settles_nothing(refusal: Exception) -> None:
    """The first try may take effect yet; one that was refused at once, or finds the key taken, will not."""
    filesystem = Store()
    storage = storage_on(filesystem, single_writer=True)
    filesystem.failures = [refusal, TimeoutError()]
    with pytest.raises(StorageError) as caught:
        storage.create("a", b"x")
    assert caught.value.may_take_effect
    filesystem.failures = [refusal]
    with pytest.raises(StorageError) as caught:
        storage.create("a", b"x")
    assert not caught.value.may_take_effect
    storage.create("a", b"x")
    filesystem.failures = [TimeoutError()]
    with pytest.raises(KeyExists) as taken:
        storage.create("a", b"x")
    assert not taken.value.may_take_effect


def test_a_first_conflict_may_be_our_own() -> None:
    """A client that sends a put again by itself hides its first try: the key is asked whose it is."""
    retry = Retry(sleep=lambda seconds: None)
    driver.create(failing(Answer(412)), retry, is_ours=lambda: True)
    with pytest.raises(Answer):
        driver.create(failing(Answer(412)), retry, is_ours=lambda: False)
    with pytest.raises(Answer):
        driver.create(failing(Answer(403)), retry, is_ours=lambda: True)


# meanings


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (FileExistsError("x"), KeyExists, "never overwritten"),
        (Answer(412), KeyExists, "never overwritten"),
        (Answer(409), KeyExists, "never overwritten"),
        (FileNotFoundError("x"), KeyMissing, "x"),
        (Answer(404), KeyMissing, ""),
        (Answer(401), StorageError, "credentials are wrong"),
        (PermissionError("no"), StorageError, r"may not read here: permit it \(s3:GetObject"),
        (Answer(507), StorageError, ""),
    ],
)
def test_every_error_becomes_ours(error: Exception, expected: type[StorageError], says: str) -> None:
    """By its class, or by the status that it, or what it was raised from, carries."""
    outer = OSError(22, "wrapped")
    outer.__cause__ = error
    for one in (error, outer) if isinstance(error, Answer) else (error,):
        found = ours(one, "read", "f/a", "s3://b", ())
        assert type(found) is expected
        assert found.key == "f/a"
        assert "cannot read 'f/a' in s3://b" in str(found)
        assert re.search(says, str(found))


def test_secrets_never_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they were given, and whatever text the driver puts them into; its error is then not kept at all."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-token")
    nested: dict[str, object] = {
        "client_kwargs": {"aws_secret_access_key": "canary-secret"},
        "sas": "canary-sas",
        "region": "eu",
    }
    assert secrets_of(nested) >= {"canary-token", "canary-secret", "canary-sas"}
    lists: dict[str, object] = {"tokens": ["canary-in-a-list", ({"deep": b"canary-in-bytes"},)], "names": ["public"]}
    assert secrets_of(lists) >= {"canary-in-a-list", "canary-in-bytes"}
    assert "public" not in secrets_of(lists)
    nested |= lists
    nested["connection_string"] = "AccountName=public;AccountKey=canary-in-a-text=="
    assert "eu" not in secrets_of(nested)
    shown = ("canary-token", "canary-secret", "canary-sas", "canary-in-a-list", "canary-in-bytes", "canary-in-a-text==")
    for secret in shown:
        filesystem = Store()
        storage = storage_on(filesystem, storage_options=nested, single_writer=True)
        filesystem.failures = [Answer(400, f"signed with {secret}, see http://user:canary@host")]
        with pytest.raises(StorageError, match=r"signed with \*\*\*") as caught:
            storage.create("a", b"x")
        assert "canary" not in "".join(traceback.format_exception(caught.value)) + repr(vars(caught.value))
        assert caught.value.__cause__ is caught.value.__context__ is None


def test_foreign_frames_are_not_kept() -> None:
    """They hold credentials in their variables, and crash children that collect them."""
    filesystem = Store()
    filesystem.failures = [Answer(400, "harmless")]
    with pytest.raises(StorageError) as caught:
        storage_on(filesystem, single_writer=True).create("a", b"x")
    assert isinstance(caught.value.__cause__, Answer)
    assert caught.value.__cause__.__traceback__ is None


# create-only


class Overwriting(Store):
    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        self.store[path] = MemoryFile(self, path, value)


class LooksFirst(Store):
    """Refuses what it has seen, as fsspec's own classes do; two at the same moment both see nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.both = threading.Barrier(2)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        if path in self.store:
            raise FileExistsError(path)
        self.both.wait(5)
        self.store[path] = MemoryFile(self, path, value)


@pytest.mark.parametrize("kind", [Overwriting, LooksFirst])
def test_a_store_that_does_not_exclude_is_refused(kind: type[Store]) -> None:
    """Found out by putting twice, and by putting at the same moment; the probe leaves nothing behind."""
    filesystem = kind()
    storage = storage_on(filesystem)
    for write in (lambda: storage.create("a", b"x"), lambda: storage.open_new("a")):
        with pytest.raises(StorageError, match="single_writer=True"):
            write()
    assert filesystem.store == {}


def test_a_single_writer_may_use_it() -> None:
    """Who says single_writer=True is believed, and nothing is probed."""
    filesystem = Overwriting()
    storage_on(filesystem, single_writer=True).create("a", b"x")
    assert len(filesystem.store) == 1


def test_a_probe_is_made_once() -> None:
    """Per root and process, however many puts follow, and none for reading."""
    filesystem = Store()
    names: list[str] = []
    put = filesystem.pipe_file
    filesystem.pipe_file = lambda path, *rest, **more: (names.append(path), put(path, *rest, **more))  # type: ignore[method-assign]
    storage = storage_on(filesystem)
    assert storage.listing("") == []
    assert names == []
    for key in ("a", "b", "c"):
        storage.create(key, b"x")
    assert sum("probe" in name for name in names) == 3


def test_a_failing_probe_says_nothing_of_the_store() -> None:
    """The put fails as any other does, and the next one probes again."""
    filesystem = Store()
    storage = storage_on(filesystem)
    filesystem.failures = [Answer(403)] * 2
    with pytest.raises(StorageError, match="may not create"):
        storage.create("a", b"x")
    storage.create("a", b"x")


# streaming without parts


def test_a_long_file_waits_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes out whole, and the local copy is gone afterwards, committed or not."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(driver, "SMALL_NBYTES", 1000)
    filesystem = Store()
    storage = storage_on(filesystem, single_writer=True)
    filesystem.put_file = lambda local, path, mode: put_local(filesystem, local, path, mode)  # type: ignore[method-assign]
    for nbytes in (1000, 1001):
        with storage.open_new(f"f/{nbytes}") as file:
            file.write(bytes(nbytes))
            assert len(list(tmp_path.iterdir())) == 1
        assert storage.size(f"f/{nbytes}") == nbytes
    with pytest.raises(ZeroDivisionError), storage.open_new("f/no") as file:
        file.write(b"x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    assert len(storage.listing("f")) == 2


def put_local(filesystem: Store, local: str, path: str, mode: str) -> None:
    filesystem.pipe_file(path, Path(local).read_bytes(), mode=mode)
