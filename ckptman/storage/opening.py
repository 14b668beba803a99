"""From what a user writes as a root to the storage behind it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote
from urllib.request import url2pathname

from ckptman.errors import redact
from ckptman.storage.base import Storage
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage

_FILE = re.compile(r"(?:file|local)://(localhost)?(?P<path>/.*)", re.IGNORECASE | re.DOTALL)
_MEMORY = re.compile(r"memory://(?P<name>.*)", re.IGNORECASE | re.DOTALL)
_OTHER = re.compile(r".*://|[a-z][a-z0-9+.-]+:[/\\]", re.IGNORECASE | re.DOTALL)

_memories: dict[str, MemoryStorage] = {}  # setdefault is atomic, so there is no lock that a fork could catch held


def open_storage(
    root: str | os.PathLike[str] | Storage,
    *,
    storage_options: Mapping[str, object] | None = None,
    single_writer: bool = False,
) -> Storage:
    """
    The storage that *root* names. Nothing is read, written or made by this.

    *root* is a path (``~`` is expanded), a ``file://`` URL (percent-encoded, with an absolute path), ``memory://name``
    (one storage for each name in this process), a URL that fsspec has a driver for (``s3://bucket/run``), or a
    storage, which is given back as it is. *storage_options* and *single_writer* are for fsspec's URLs, see
    `ckptman.storage.object.ObjectStorage`.

    Raises:
        ValueError: *root* is empty, or a URL without a driver; or there are options for what takes none. ``./`` in
            front makes anything a path.
        TypeError: It is none of these.
    """
    if isinstance(root, (str, os.PathLike)):
        text = os.fspath(root)
        if isinstance(text, str) and _OTHER.match(text) and not (_FILE.fullmatch(text) or _MEMORY.fullmatch(text)):
            return _open_url(text, storage_options, single_writer=single_writer)
        _refuse_options(text, storage_options)
        return _open_text(text)
    if isinstance(root, Storage):
        _refuse_options(root.url, storage_options)
        return root
    raise TypeError(f"a root is a path, a URL or a storage, got {type(root).__name__}")


def local_path(place: str | os.PathLike[str]) -> Path:
    """
    *place* as a path of this machine, for what is no root and cannot lie in a bucket.

    Raises:
        ValueError: It looks like a URL, of which ``Path`` would make a folder called ``s3:``.
    """
    text = os.fspath(place)
    if _OTHER.match(text):
        raise ValueError(f"{redact(text)!r} is no path of this machine: a URL can only be a root")
    return Path(text)


def _refuse_options(root: str, storage_options: Mapping[str, object] | None) -> None:
    if storage_options:
        raise ValueError(f"{redact(root)!r} takes no storage_options: they are for the drivers of URLs such as s3://…")


def _open_url(url: str, storage_options: Mapping[str, object] | None, *, single_writer: bool) -> Storage:
    url = url.replace("\\", "/")  # pasted together on Windows; no key holds one
    protocol, separator, rest = url.partition("://")
    if not separator or protocol.lower() == "file" or not rest.strip("/"):
        raise ValueError(
            f"{redact(url)!r} cannot be opened: a root is a local path, file:///absolute/path, memory://name, or a URL "
            "such as s3://bucket/run"
        )
    from ckptman.storage.object import ObjectStorage, check_protocol  # fsspec and its drivers are slow to import

    check_protocol(url)
    return ObjectStorage(url, storage_options=storage_options, single_writer=single_writer)


def _open_text(root: str) -> Storage:
    if file := _FILE.fullmatch(root):
        return LocalStorage(url2pathname(file["path"]) if os.name == "nt" else unquote(file["path"]))
    if memory := _MEMORY.fullmatch(root):
        name = memory["name"].strip("/")
        return _memories.setdefault(name, MemoryStorage(name))
    return LocalStorage(root)
