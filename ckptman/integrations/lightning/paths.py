"""Lightning speaks of checkpoints by path; a root speaks of steps and tags. Here one becomes the other."""

from __future__ import annotations

import os

from ckptman.format.names import Attempt
from ckptman.integrations.files import tag_of
from ckptman.repository.repository import Repository, Which
from ckptman.storage.opening import open_storage

MARK = "ckptman.json"


def split(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The folder of *path*, which is the root, and its last part."""
    text = os.fspath(path)
    if "://" in text:
        root, _, name = text.rstrip("/").rpartition("/")
        return root, name
    root, name = os.path.split(os.path.abspath(text))  # noqa: PTH100 - as Lightning itself compares paths
    return root, name


def locate(path: str | os.PathLike[str]) -> tuple[str, Which] | None:
    """
    The root and the checkpoint that *path* means; None if it means nothing of ours.

    It may be a root or the ``ckptman.json`` in it (the newest intact checkpoint), a folder of a checkpoint as in
    `Checkpoint.url`, or a name under which Lightning saved.
    """
    root, name = split(path)
    if _has_checkpoints(root):
        return _within(root, name)
    text = os.fspath(path)
    return (text, "latest") if _has_checkpoints(text) else None


def _within(root: str, name: str) -> tuple[str, Which] | None:
    if name == MARK:
        return root, "latest"
    attempt = Attempt.parse(name)
    if attempt is not None:
        return root, attempt.step
    return (root, tag_of(name)) if tag_of(name) in tags(root) else None


def tags(root: str) -> frozenset[str]:
    """All tags in *root*; none if there is nothing in it."""
    return frozenset(tag for entry in Repository(open_storage(root)).entries() for tag in entry.tags)


def resume_path(root: str | os.PathLike[str]) -> str | None:
    """
    What to give ``Trainer.fit(ckpt_path=…)`` to go on from the newest intact checkpoint of *root*.

    None, which is a fresh start, only if *root* has no checkpoint at all: where all are damaged, loading raises.

    Raises:
        FormatError: There are checkpoints, but no readable catalog.
        StorageError: The medium failed.
    """
    text = os.fspath(root)
    return f"{text.rstrip('/')}/{MARK}" if Repository(open_storage(text)).entries() else None


def _has_checkpoints(root: str) -> bool:
    if os.path.isfile(root):  # noqa: PTH113 - a URL is no Path
        return False
    try:
        storage = open_storage(root)
    except ValueError:  # a URL that we cannot open
        return False
    return bool(Repository(storage).entries())
