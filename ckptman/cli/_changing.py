"""What the commands that change a root share: look first, show and ask, then act as the writer."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import click

from ckptman.errors import CheckpointNotFound
from ckptman.format.catalog import Entry
from ckptman.format.names import MARKER
from ckptman.repository.adopt import adopt
from ckptman.repository.commit import Change
from ckptman.repository.head import attempts, record_numbers
from ckptman.repository.ownership import take
from ckptman.repository.repository import Repository
from ckptman.repository.sweep import garbage
from ckptman.storage.base import KeyMissing, Storage


def refuse_missing(storage: Storage) -> None:
    """
    Return if *storage* holds a root: one that does not exist is never created by a command.

    Raises:
        CheckpointNotFound: Nothing of ours is there.
    """
    if not (record_numbers(storage) or attempts(storage) or _has_marker(storage)):
        raise CheckpointNotFound(f"{storage.url} has no checkpoint: nothing there is ckptman's. Is the path right?")


def _has_marker(storage: Storage) -> bool:
    try:
        storage.size(MARKER)
    except KeyMissing:
        return False
    return True


def entries_to_change(storage: Storage) -> tuple[Entry, ...]:
    """What a change will find: what exists, and what a writer adopts first where the newest record is damaged."""
    refuse_missing(storage)
    head = Repository(storage).head()
    listed = head.record.checkpoints if head.record else ()
    return adopt(storage, listed) if head.damaged else listed


def freeable_nbytes(storage: Storage, left: Sequence[Entry], candidates: Iterable[str]) -> int:
    """Bytes of those files of the attempts *candidates* that none of the entries *left* owns or borrows."""
    return sum(stored.nbytes for stored in garbage(storage, left, candidates))


def refuse_unsure(*, is_sure: bool, as_json: bool) -> None:
    """Raise UsageError (exit 2) if nobody said ``--yes`` and there is nobody to ask."""
    if is_sure:
        return
    if as_json:
        raise click.UsageError("nothing was changed: with --json there is no question, so say --yes")
    if not sys.stdin.isatty():
        raise click.UsageError("nothing was changed: there is no terminal to ask on, so say --yes")


def confirm(question: str, *, is_sure: bool) -> None:
    """Ask on the terminal unless *is_sure*. Exit 1 if the answer is no."""
    if not is_sure and not click.confirm(question, err=True):
        raise click.ClickException("nothing was changed")


def apply(storage: Storage, change: Change, what: str, *, timeout_s: float) -> None:
    """Become the writer, commit *change*, delete what it freed, and let go. Raises as `take` does."""
    take(storage, timeout_s=timeout_s, change=change, what=what).release()
