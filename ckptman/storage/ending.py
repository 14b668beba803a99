"""What every `NewFile` has in common: it ends once, by ``commit`` or ``abort``, and leaving its block ends it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Generic, Self, TypeVar

Held = TypeVar("Held")


class Ending(ABC, Generic[Held]):
    """
    A file being written, called *name* in messages, by means of *held*: bytes, a descriptor, an upload.

    Whoever ends it sets ``_held`` to None; from then on nothing can be written.
    """

    def __init__(self, name: str, held: Held) -> None:
        self._name = name
        self._held: Held | None = held  # None once committed or aborted

    @abstractmethod
    def commit(self) -> None:
        """See `NewFile.commit`."""

    @abstractmethod
    def abort(self) -> None:
        """See `NewFile.abort`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._held is not None:
            self.commit()

    def _still(self) -> Held:
        """What is held. Raises ValueError if the file has ended."""
        if self._held is None:
            raise ValueError(f"{self._name} was committed or aborted already: nothing more can be written to it")
        return self._held
