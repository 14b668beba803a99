"""A root and its mirror, as a restore looks at them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ckptman.errors import CheckpointNotFound, CkptmanError, StorageError
from ckptman.events import Damaged, Event, MirrorErred
from ckptman.format.catalog import Entry, Record, read_newest, read_record
from ckptman.repository.both import Placed, of_both, seen_until
from ckptman.repository.counterparts import counterpart
from ckptman.repository.head import Head
from ckptman.repository.repository import Repository, Which, find
from ckptman.warning import warn

_log = logging.getLogger("ckptman")


@dataclass(frozen=True, slots=True, kw_only=True)
class Roots:
    """
    What exists in a root, and in its mirror where it has one. Each call reads anew.

    Attributes:
        root: The root itself.
        mirror: Its mirror; None where it has none.
        emit: Told of damaged records, and of a mirror that cannot be read.
    """

    root: Repository
    mirror: Repository | None
    emit: Callable[[Event], None]

    def of(self, placed: Placed) -> Repository:
        """Where *placed* is to be read from."""
        return self.mirror if placed.is_mirrored and self.mirror is not None else self.root

    def entries(self) -> tuple[Entry, ...]:
        """What exists in the root, oldest commit first. Raises as `Repository.head` does."""
        record = self._head().record
        return record.checkpoints if record else ()

    def newest(self) -> Entry | None:
        """The last of ``entries``, without looking at the others; None if there is none. Raises as they do."""
        record = self._head(read=read_newest).record
        return record.checkpoints[-1] if record and record.checkpoints else None

    def choose(self, which: Which, passed_over: Collection[tuple[str, bool]]) -> Placed | None:
        """
        The best that *which* means, but for those *passed_over* (their keys); None if there is none left.

        Of what both roots have it is the root's own. A step, metric or tag is looked for in the mirror after the root.

        Raises:
            CheckpointNotFound: Neither has it, and it is not the latest that is wanted.
            FormatError, StorageError: The root cannot be read; or it has nothing, and the mirror cannot be read.
        """
        candidates = self._both() if which == "latest" else self._named(which, passed_over)
        return next((one for one in reversed(candidates) if one.key not in passed_over), None)

    def lists(self, placed: Placed) -> bool:
        """Whether *placed* still exists."""
        return placed.entry in (self.of(placed).entries() if placed.is_mirrored else self.entries())

    def _both(self) -> list[Placed]:
        head = self._head()
        own = head.record.checkpoints if head.record else ()
        if self.mirror is None:
            return [Placed(entry, False) for entry in own]
        return of_both(own, seen_until(self.root.storage, head), self._mirrored(own))

    def _named(self, which: Which, passed_over: Collection[tuple[str, bool]]) -> list[Placed]:
        url, own = self.root.storage.url, self.entries()
        try:
            placed = Placed(find(own, which, url), False)
        except CheckpointNotFound:
            if self.mirror is None:
                raise
            return [Placed(find(self._mirrored(own), which, url), True)]
        if placed.key not in passed_over:
            return [placed]
        copy = counterpart(placed.entry, self._mirrored(own))
        return [] if copy is None else [Placed(copy, True)]

    def _mirrored(self, own: Collection[Entry]) -> tuple[Entry, ...]:
        """What the mirror has; nothing where it cannot be read, unless there is nothing of our *own* either."""
        if self.mirror is None:
            return ()
        try:
            return self.mirror.entries()
        except CkptmanError as error:
            root, url = self.root.storage.url, self.mirror.storage.url
            if not own:
                raise StorageError(
                    f"{root} has no checkpoint, and its mirror {url} cannot be read: {error}. To start afresh all the "
                    "same, leave the mirror out"
                ) from error
            _log.warning("the mirror %s cannot be read, so %s is restored without it: %s", url, root, error)
            self.emit(MirrorErred(root=root, mirror=url, step=None, error=error, retry_s=None))
            return ()

    def _head(self, *, read: Callable[[bytes, int], Record] = read_record) -> Head:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            head = self.root.head(read=read)
        for one in caught:
            warn(one.message, one.category)
            self.emit(Damaged(root=self.root.storage.url, step=None, reason=str(one.message)))
        return head
