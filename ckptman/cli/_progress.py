"""A bar for what takes long: on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], object]
"""Called with the number of bytes that were just dealt with."""


@contextmanager
def progress_bar(nbytes: int) -> Iterator[Advance]:
    """A bar that is full after *nbytes* bytes; what it gives advances it."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=nbytes)
        yield lambda nbytes: bar.advance(task, nbytes)
