"""The whole examination of a root: a folder of its own, all findings, and everything removed again."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptman.doctor import costs, exclusion
from ckptman.doctor.findings import Finding, duration, median_s
from ckptman.doctor.nodes import meet
from ckptman.errors import StorageError
from ckptman.storage.base import Storage

PREFIX = "doctor-"


def examine(storage: Storage, root: str, *, nodes: int | None = None, timeout_s: float = 60.0) -> Iterator[Finding]:
    """
    Look at *storage*; *root* is the text by which another process opens it. Yields each finding as it is made.

    With *nodes*, also together with so many machines that do the same. Takes a few seconds, longer where requests are
    slow, and up to 256 MiB of space for a moment. A storage that fails is a finding, too.
    """
    missing = _missing(storage)
    with _removed_at_the_end(missing):
        findings = list(_alone(storage, root))
        yield from findings
        if nodes is not None and all(one.name != "writing" or one.verdict == "ok" for one in findings):
            yield from meet(storage, nodes=nodes, timeout_s=timeout_s, missing=len(missing))


def _alone(storage: Storage, root: str) -> Iterator[Finding]:
    folder = f"{PREFIX}{secrets.token_hex(8)}"
    try:
        try:
            storage.create(f"{folder}/hello", b"x")
        except StorageError as error:
            yield Finding(name="writing", verdict="bad", what=str(error))
            yield from _reading(storage)
            return
        yield Finding(name="writing", verdict="ok", what="a key can be created")
        yield from exclusion.look(storage, root, folder)
        yield from costs.look(storage, folder)
    except StorageError as error:
        yield Finding(name="failure", verdict="bad", what=str(error))
    finally:
        with suppress(StorageError):  # nothing more can be done, and what was found is worth more
            storage.delete([stored.key for stored in storage.listing(folder)])
            storage.remove_temporaries(folder)


def _reading(storage: Storage) -> Iterator[Finding]:
    try:
        list_s = median_s(costs.TIMES, lambda n: storage.listing("catalog"))
        count = len(storage.folders())
    except StorageError as error:
        yield Finding(name="reading", verdict="bad", what=str(error))
        return
    what = f"{count} folders can be listed, in {duration(list_s)}"
    yield Finding(name="reading", verdict="ok", what=what, figures={"list_s": list_s})


def _missing(storage: Storage) -> list[Path]:
    """The root, and the directories above it, as far as they do not exist; nothing where no directory is needed."""
    if storage.lock_path is None:
        return []
    return [path for path in storage.lock_path.parents if _is_missing(path)]


def _is_missing(path: Path) -> bool:
    """Whether *path* is certainly not there: where this process may not look, it is left alone."""
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


@contextmanager
def _removed_at_the_end(missing: Iterable[Path]) -> Iterator[None]:
    """Remove those directories that were *missing*, as far as they are empty."""
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
