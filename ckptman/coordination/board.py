"""The seam between ranks: a board on which each may pin small values under keys that all see."""

from __future__ import annotations

from typing import Protocol


class Board(Protocol):
    """
    Values by key, shared by all ranks of one job and by nobody else. A key is pinned once; whole or not at all.

    What is not promised: any order in which keys of different ranks appear, or that a key outlives the job. One
    thread at a time: another thread takes a board of its own with `connect`.
    """

    @property
    def beat_s(self) -> float:
        """How often a rank should say that it lives, in seconds: as often as the medium bears."""

    @property
    def max_pause_s(self) -> float:
        """The longest pause between two looks at the board."""

    @property
    def keeper(self) -> int | None:
        """The rank with which the board itself would vanish; None where it outlives every rank."""

    def connect(self) -> Board:
        """The same board, for another thread."""

    def pin(self, key: str, value: bytes) -> None:
        """Make *value* visible under the new *key*. Raises StorageError."""

    def pin_first(self, key: str, value: bytes) -> bytes:
        """Pin *value*, a small UTF-8 text, unless somebody was first; return what is there. Raises StorageError."""

    def has(self, key: str) -> bool:
        """Whether *key* is pinned. Never waits. Raises StorageError."""

    def read(self, key: str) -> bytes:
        """What is pinned under *key*, which is there. Raises StorageError."""

    def remove(self, keys: list[str]) -> None:
        """Take *keys*, which were read or pinned here, down. Raises StorageError."""

    def beat(self, rank: int, count: int) -> None:
        """Show that *rank* lives: *count* is larger each time. Raises StorageError."""

    def beats(self, ranks: list[int]) -> dict[int, int]:
        """The latest count of each of *ranks* that was ever heard of. Raises StorageError."""

    def close(self) -> None:
        """Let go of what this object holds."""
