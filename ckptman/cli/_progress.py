"""A bar for what takes long: on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], object]
"""Called with the number of bytes that were just dealt with."""

Progress = Callable[[int, int], object]
"""Called with how many bytes were dealt with so far, and of how many."""


@contextmanager
def progress_bar(nbytes: int) -> Iterator[Advance]:
    """A bar that is full after *nbytes* bytes; what it gives advances it."""
    done = 0
    with progress_of_all() as tell:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            tell(done, nbytes)

        yield advance


@contextmanager
def progress_of_all(*, is_shown: bool = True) -> Iterator[Progress]:
    """A bar for what turns out later to be so and so much."""
    if not is_shown or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
