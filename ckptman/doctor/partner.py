"""
Another process that opens the same root, and does there what it is told to.

One JSON object in a line on stdin for each thing to do, one on stdout for its outcome. The root comes on stdin too:
a URL may hold a secret, and everybody can read a process's arguments.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from ckptman.errors import CkptmanError, StorageError
from ckptman.repository.file_lock import RootLock
from ckptman.storage.base import KeyExists, KeyMissing, Storage
from ckptman.storage.opening import open_storage

RACE_S = 3.0
"""A race ends after this time, however slow the storage is."""


class Partner:
    """
    The process, as seen from the examination. As a context manager it is killed at the end, whatever happened.

    Raises:
        StorageError: From every method: the process said that the storage failed, or it is gone.
    """

    def __init__(self, root: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ckptman.doctor.partner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._say({"root": root})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def sees(self, key: str) -> bool:
        """Whether *key* is there for the other process."""
        return bool(self.ask("see", key=key))

    def create(self, key: str) -> None:
        """Have it create *key*."""
        self.ask("create", key=key)

    def hold(self, key: str) -> None:
        """Have it take a file lock at *key*, and keep it until it is killed."""
        self.ask("hold", key=key)

    def begin(self, do: str, **words: object) -> None:
        """Tell it what to do; `outcome` waits for it."""
        self._say({"do": do, **words})

    def outcome(self) -> Any:
        """What came of what was begun."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise StorageError("the process that was to look at the same root ended by itself")
        answer = json.loads(line)
        if "error" in answer:
            raise StorageError(f"another process met a failure: {answer['error']}")
        return answer["outcome"]

    def ask(self, do: str, **words: object) -> Any:
        """`begin` and `outcome`."""
        self.begin(do, **words)
        return self.outcome()

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._process.wait()

    def _say(self, words: dict[str, object]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise StorageError("the process that was to look at the same root ended by itself") from error


def race(storage: Storage, *, folder: str, rounds: int, token: str) -> list[str]:
    """Try to create *rounds* keys in *folder*, each with *token*; return those that were ours to create."""
    won = []
    ends_at = time.monotonic() + RACE_S
    for number in range(rounds):
        if time.monotonic() > ends_at:
            break
        key = f"{folder}/race-{number:03d}"
        try:
            storage.create(key, token.encode())
        except KeyExists:
            continue
        won.append(key)
    return won


def _see(storage: Storage, *, key: str) -> bool:
    try:
        storage.size(key)
    except KeyMissing:
        return False
    return True


def _create(storage: Storage, *, key: str) -> bool:
    storage.create(key, b"x")
    return True


_held: list[RootLock] = []  # what is referred to nowhere is released


def _hold(storage: Storage, *, key: str) -> bool:
    assert storage.lock_path is not None
    lock = RootLock(storage.lock_path.parent / key)
    _held.append(lock)
    return lock.acquire(0)


_DOINGS: dict[str, Callable[..., object]] = {"race": race, "see": _see, "create": _create, "hold": _hold}


def main() -> None:
    """Do what stdin says until it ends."""
    root = json.loads(sys.stdin.readline())["root"]
    for line in sys.stdin:
        words = json.loads(line)
        try:
            answer = {"outcome": _DOINGS[words.pop("do")](_opened(root), **words)}
        except (CkptmanError, ValueError, ImportError) as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


@functools.cache
def _opened(root: str) -> Storage:
    return open_storage(root)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # Ctrl-C reaches every process of the terminal; the examination tells of it
        main()
