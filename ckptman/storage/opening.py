"""From what a user writes as a root to the storage behind it."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote
from urllib.request import url2pathname

from ckptman.errors import redact
from ckptman.storage.base import Storage
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage

_FILE = re.compile(r"file://(localhost)?(?P<path>/.*)", re.IGNORECASE | re.DOTALL)
_MEMORY = re.compile(r"memory://(?P<name>.*)", re.IGNORECASE | re.DOTALL)
_OTHER = re.compile(r".*://|[a-z][a-z0-9+.-]+:/", re.IGNORECASE | re.DOTALL)

_memories: dict[str, MemoryStorage] = {}  # setdefault is atomic, so there is no lock that a fork could catch held


def open_storage(root: str | os.PathLike[str] | Storage) -> Storage:
    """
    The storage that *root* names. Nothing is read, written or made by this.

    *root* is a path (``~`` is expanded), a ``file://`` URL (percent-encoded, with an absolute path), ``memory://name``
    (one storage for each name in this process), or a storage, which is given back as it is.

    Raises:
        ValueError: *root* is empty, or a URL of another kind. ``./`` in front makes anything a path.
        TypeError: It is none of these.
    """
    if isinstance(root, (str, os.PathLike)):
        return _open_text(os.fspath(root))
    if isinstance(root, Storage):
        return root
    raise TypeError(f"a root is a path, a URL or a storage, got {type(root).__name__}")


def _open_text(root: str) -> Storage:
    if file := _FILE.fullmatch(root):
        return LocalStorage(url2pathname(file["path"]) if os.name == "nt" else unquote(file["path"]))
    if memory := _MEMORY.fullmatch(root):
        name = memory["name"].strip("/")
        return _memories.setdefault(name, MemoryStorage(name))
    if isinstance(root, str) and _OTHER.match(root):
        raise ValueError(
            f"{redact(root)!r} cannot be opened: this version of ckptman knows local paths, file:///absolute/path and "
            "memory://name only"
        )
    return LocalStorage(root)
