"""Printing: JSON documents, tables, and sizes and ages as people say them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import MappingProxyType

import click

from ckptman.cli._documents import SCHEMA
from ckptman.repository.commit import utc_now

_PIPED_WIDTH = 1000
"""Lines of a table that is piped are as long as they are, so that ``grep`` finds whole rows."""


@contextmanager
def writing() -> Iterator[None]:
    """
    Turn the failure of an output (a full disk behind ``>``, a closed stdout) into an error of one line.

    A closed pipe passes: click ends a run quietly for it.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise click.ClickException(f"the output cannot be written: {error.strerror or error}") from error


def print_json(document: Mapping[str, object]) -> None:
    """Print *document*, with its schema's number, on stdout."""
    print_text(json.dumps({"schema": SCHEMA, **document}, indent=2, allow_nan=False))


def print_text(text: str) -> None:
    """Print a line of data on stdout. Raises ClickException where it cannot be written."""
    with writing():
        click.echo(text)


def note(text: str) -> None:
    """Tell the person at the terminal something that is no data: on stderr."""
    click.echo(text, err=True)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    is_note: bool = False,
    styles: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """
    Print a table. A column whose title ends in ``>`` is aligned to the right. Plain text where it is piped.
    *styles* are the colours of whole cells, by their text; without any title there is no row of titles.

    With *is_note* it goes to stderr: what would be done, and not what was found.
    """
    from rich.console import Console  # late: JSON does not need it
    from rich.table import Table
    from rich.text import Text

    stream = sys.stderr if is_note else sys.stdout
    is_terminal = stream.isatty()
    built = Table(box=None, show_header=any(columns), pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in columns:
        built.add_column(title.rstrip(">"), justify="right" if title.endswith(">") else "left", overflow="fold")
    for row in rows:
        built.add_row(*(Text(printable(cell), style=styles.get(cell, "")) for cell in row))
    text = io.StringIO()
    console = Console(
        file=text,
        force_terminal=is_terminal,
        width=Console(file=stream).width if is_terminal else _PIPED_WIDTH,
        highlight=False,
    )
    console.print(built)
    with writing():
        click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()), file=stream)


def printable(text: str) -> str:
    """*text* without control characters: a name from a file cannot move the cursor of whoever looks at it."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def size(nbytes: int) -> str:
    """``1536`` → ``1.5 KiB``."""
    amount, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 1023.95:
            break
        amount, unit = amount / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{amount:.1f} {unit}"


def age(time: datetime, *, now: datetime | None = None) -> str:
    """How long ago *time* was, in the largest unit that fits."""
    seconds = ((now or utc_now()) - time).total_seconds()
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds // length_s:.0f} {unit} ago"
    return "now" if seconds < 1 else f"{seconds:.0f} s ago"


def count(n: int, noun: str) -> str:
    """``1 checkpoint``, ``2 checkpoints``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def steps_named(steps: Sequence[int]) -> str:
    """``step 1``, ``steps 1, 2``."""
    return f"step{'s' * (len(steps) != 1)} {steps_text(steps)}"


def steps_text(steps: Iterable[int]) -> str:
    """``1, 2, 3``; of many the first and last."""
    texts = [str(step) for step in steps]
    return ", ".join(texts if len(texts) <= 10 else [*texts[:6], "…", *texts[-3:]])
