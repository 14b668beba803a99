"""The place of an export: written beside it, durable, and moved there in one step when it is complete."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ckptman.errors import StorageError


def refuse_taken(out: Path) -> None:
    """Raise StorageError unless *out* is free: it does not exist, or is an empty directory."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise StorageError(f"{out} exists already: nothing was exported. Remove it, or choose another place")


@contextmanager
def placed(out: Path) -> Iterator[Path]:
    """
    A path beside *out*, where the block makes a file or a directory; it becomes *out* when the block ends.

    If the block raises, nothing is left. *Not* promised: that *out* stays free for us while the block runs, if others
    write there; what they put is not overwritten where it is a directory with something in it.

    Raises:
        StorageError: *out* exists, or the medium failed.
    """
    refuse_taken(out)
    temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        refuse_taken(out)
        if temporary.is_dir():
            _persist_folder(temporary)
        elif out.is_dir():
            out.rmdir()
        temporary.replace(out)
        _persist_folder(out.parent)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError.from_os(error, f"exporting to {out}") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A new file at *path*, whose bytes are durable when the block has ended. Its name is not: see `placed`."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def new_folder(path: Path) -> None:
    """A new directory at *path*."""
    try:
        path.mkdir()
    except OSError as error:
        raise StorageError.from_os(error, f"making {path}") from error


def _persist_folder(path: Path) -> None:
    if os.name == "nt":
        return  # a directory cannot be opened there, and needs not be
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
