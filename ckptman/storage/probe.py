"""Finding out whether a create-only put excludes: by putting, never by the name of a protocol."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ckptman.errors import StorageError
from ckptman.storage.base import Buffer, KeyExists


def excludes(put: Callable[[str, Buffer], object], delete: Callable[[str], object]) -> bool:
    """
    Whether of two create-only puts of one fresh name, sent at the same moment, at most one is let pass, and a third,
    after them, is refused. Leaves nothing behind, unless it is killed.

    Two that look first and write then may pass by luck; `ckptman.testing.contracts` and ``ckptman doctor`` race more.

    Raises:
        StorageError: The storage failed. Nothing is known.
    """
    name = secrets.token_hex(16)
    try:
        both = _at_once(lambda: _passes(put, name))
        return sum(both) <= 1 and not _passes(put, name)
    finally:
        with suppress(StorageError):  # a later cleaning removes it
            delete(name)


def _at_once(call: Callable[[], bool]) -> tuple[bool, bool]:
    with ThreadPoolExecutor(1, thread_name_prefix="ckptman-probe") as pool:
        try:
            other = pool.submit(call)
        except RuntimeError:  # the interpreter is about to end, and starts no thread any more
            return call(), call()
        return call(), other.result()


def _passes(put: Callable[[str, Buffer], object], name: str) -> bool:
    try:
        put(name, secrets.token_bytes(16))
    except KeyExists:
        return False
    return True
