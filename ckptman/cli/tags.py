"""``ckptman tag`` and ``ckptman untag``: names for checkpoints."""

from __future__ import annotations

import click

from ckptman.cli._arguments import Step, Tag, json_option, lock_timeout_option, root_argument
from ckptman.cli._changing import apply, entries_to_change
from ckptman.cli._render import print_json, print_text
from ckptman.errors import CheckpointNotFound
from ckptman.repository.changes import tagging, untagging
from ckptman.repository.repository import find
from ckptman.storage.base import Storage


@click.command(short_help="Name a checkpoint, and keep it.")
@root_argument(required=True)
@click.argument("step", type=Step())
@click.argument("name", type=Tag())
@lock_timeout_option
@json_option
def tag(storage: Storage, step: int | str, name: str, *, lock_timeout_s: float, as_json: bool) -> None:
    """
    Give the checkpoint STEP the tag NAME. A tag that another checkpoint has moves.

    A tagged checkpoint is never pruned, and STEP may be its tag wherever a STEP is asked for.
    """
    entries = entries_to_change(storage)
    entry = find(entries, step, storage.url)
    before = next((one.step for one in entries if name in one.tags), None)
    if before != entry.step:
        change = tagging(entry.step, name, storage.url)
        apply(storage, change, f"tag step {entry.step} {name!r}", timeout_s=lock_timeout_s)
    if as_json:
        _print_document(storage, entry.step, list(dict.fromkeys((*entry.tags, name))))
    else:
        moved = f" (moved from step {before})" if before not in (None, entry.step) else ""
        print_text(f"step {entry.step} is tagged {name}{moved}")


@click.command(short_help="Take a name away.")
@root_argument(required=True)
@click.argument("step", type=Step())
@click.argument("name", type=Tag())
@lock_timeout_option
@json_option
def untag(storage: Storage, step: int | str, name: str, *, lock_timeout_s: float, as_json: bool) -> None:
    """Take the tag NAME from the checkpoint STEP."""
    entry = find(entries_to_change(storage), step, storage.url)
    if name not in entry.tags:
        raise CheckpointNotFound(f"step {entry.step} of {storage.url} has no tag {name!r}")
    change = untagging(entry.step, name, storage.url)
    apply(storage, change, f"untag step {entry.step} {name!r}", timeout_s=lock_timeout_s)
    if as_json:
        _print_document(storage, entry.step, [tag for tag in entry.tags if tag != name])
    else:
        print_text(f"step {entry.step} is no longer tagged {name}")


def _print_document(storage: Storage, step: int, tags: list[str]) -> None:
    print_json({"root": storage.url, "step": step, "tags": tags})
