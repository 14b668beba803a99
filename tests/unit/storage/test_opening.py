"""What a root may be called."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from ckptman.storage.base import Storage
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage
from ckptman.storage.object import ObjectStorage
from ckptman.storage.opening import open_storage


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and Path, relative and absolute, with ``~``, with odd characters; nothing is made by opening."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root, expected in (
        ("runs/a", "runs/a"),
        (Path("runs/a"), "runs/a"),
        (str(tmp_path / "x y"), "x y"),
        ("~/runs", "runs"),
        ("./s3:/b", "s3:/b"),
        ("a%20b", "a%20b"),
        ("a:b", "a:b"),
        (".", "."),
    ):
        storage = open_storage(root)
        assert isinstance(storage, LocalStorage)
        assert storage.url == str(tmp_path / expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///runs/a", "/runs/a"),
        ("FILE:///runs/a", "/runs/a"),
        ("file://localhost/runs/a", "/runs/a"),
        ("local:///runs/a", "/runs/a"),
        ("file:///runs/a%20b", "/runs/a b"),
        ("file:///runs/a?b#c", "/runs/a?b#c"),
    ],
)
def test_file_urls(url: str, path: str) -> None:
    """They name the same root as the path does."""
    assert open_storage(url).url == path
    assert open_storage(url).identity == LocalStorage(path).identity


def test_memory_urls() -> None:
    """One storage per name in this process, whatever the slashes, and another for another name."""
    storage = open_storage("memory://test-opening/a")
    assert isinstance(storage, MemoryStorage)
    assert open_storage("memory:///test-opening/a/") is storage
    assert open_storage("memory://test-opening/b") is not storage
    assert storage.url == "memory://test-opening/a"
    assert storage.identity != MemoryStorage("test-opening/a").identity


def test_a_storage_is_itself(tmp_path: Path) -> None:
    """What is a storage already passes through."""
    storages: list[Storage] = [MemoryStorage(), LocalStorage(tmp_path)]
    for storage in storages:
        assert open_storage(storage) is storage


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("s3:/bucket", "s3://bucket/run"),
        ("s3://", "s3://bucket/run"),
        ("file://host/a", "file:///absolute/path"),
        ("file://a", "file:///absolute/path"),
        ("file:/a", "file:///absolute/path"),
        ("http://x", "nothing can be created"),
        ("simplecache::s3://b/c", "leave simplecache:: out"),
        ("dir::file:///runs/a", "give its path alone"),
        ("dir://runs::local:///a", "give its path alone"),
        ("nosuch://b/c", "no protocol 'nosuch'.*ckptman"),
        ("gs://bucket/run", "pip install 'ckptman.gcs.'"),
    ],
)
def test_other_urls_are_refused(root: str, says: str) -> None:
    """None of them becomes a local directory of that name; the message says what to do."""
    if root.startswith("gs:") and find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(ValueError, match=says):
        open_storage(root)


def test_object_urls() -> None:
    """A URL of fsspec's is an object storage, which is not contacted; the same URL has the same identity."""
    storage = open_storage("s3://bucket/run/", storage_options={"key": "k"})
    assert isinstance(storage, ObjectStorage)
    assert storage.url == "s3://bucket/run"
    assert storage.identity == open_storage("s3://bucket/run").identity
    assert storage.lock_path is None
    assert open_storage("s3://bucket\\run\\7").url == "s3://bucket/run/7"
    assert open_storage("s3:\\\\bucket\\run\\7").url == "s3://bucket/run/7"


def test_chained_urls() -> None:
    """A folder within another filesystem is a root like any other."""
    storage = open_storage("dir://runs::memory://chained", single_writer=True)
    assert isinstance(storage, ObjectStorage)
    storage.create("f/a", b"x")
    assert storage.read("f/a", limit=1) == b"x"
    assert [stored.key for stored in storage.listing("")] == ["f/a"]
    assert storage.folders() == ["f"]


def test_options_are_for_drivers(tmp_path: Path) -> None:
    """Options that nobody would look at are refused, without being shown."""
    for root in (tmp_path, "memory://a", MemoryStorage()):
        with pytest.raises(ValueError, match="takes no storage_options") as caught:
            open_storage(root, storage_options={"secret": "canary"})
        assert "canary" not in str(caught.value)


def test_credentials_are_not_repeated() -> None:
    """A refused URL is shown without its user and secret."""
    with pytest.raises(ValueError, match="bucket") as caught:
        open_storage("nosuch://user:secret@bucket/run")
    assert "secret" not in str(caught.value)


def test_what_is_no_root() -> None:
    """Empty text is a ValueError, another type a TypeError."""
    with pytest.raises(ValueError, match="''"):
        open_storage("")
    with pytest.raises(TypeError, match="NoneType"):
        open_storage(None)  # type: ignore[arg-type]
