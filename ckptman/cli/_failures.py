"""How a run fails: one line on stderr (one object with ``--json``), and an exit code. Warnings are told there too."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import click

from ckptman.errors import CkptmanError
from ckptman.repository.repository import DamagedCheckpointWarning

INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended: 128 + SIGINT."""


@contextmanager
def failing(*, as_json: bool) -> Iterator[None]:
    """
    Turn the errors that a run may end with into a message and an exit.

    What is neither ours nor click's is a bug: it passes, and Python shows where it came from.
    """
    try:
        yield
    except click.Abort:
        _fail("Interrupted", "interrupted", INTERRUPTED, as_json=as_json)
    except click.UsageError as error:
        _fail("UsageError", _usage(error, as_json=as_json), error.exit_code, as_json=as_json)
    except click.ClickException as error:
        _fail(type(error).__name__, error.format_message(), error.exit_code, as_json=as_json)
    except CkptmanError as error:
        _fail(_public_name(error), str(error), error.exit_code, as_json=as_json)


def _public_name(error: CkptmanError) -> str:
    """The name of its class in the tree of errors.py; lower floors have finer ones for themselves."""
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == CkptmanError.__module__)


def _usage(error: click.UsageError, *, as_json: bool) -> str:
    where = error.ctx.command_path if error.ctx else "ckptman"
    return error.format_message() if as_json else f"{error.format_message().rstrip('.')} (see '{where} --help')"


def _fail(name: str, message: str, exit_code: int, *, as_json: bool) -> None:
    if as_json:
        text = json.dumps({"error": name, "message": message, "exit_code": exit_code})
    else:
        text = f"error: {' '.join(message.split())}"
    click.echo(text, err=True)
    sys.exit(exit_code)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Tell every warning of the block on stderr, in one line, and the same one once only."""
    told: set[str] = set()

    def tell(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = f"warning: {' '.join(str(message).split())}"
        if text not in told:
            told.add(text)
            click.echo(text, err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", DamagedCheckpointWarning)
        warnings.showwarning = tell
        yield
