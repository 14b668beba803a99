"""``ckptman delete``: drop checkpoints by name."""

from __future__ import annotations

import click

from ckptman.cli._arguments import Step, json_option, lock_timeout_option, root_argument, yes_option
from ckptman.cli._changing import entries_to_change
from ckptman.cli._dropping import drop
from ckptman.repository.changes import deleting
from ckptman.repository.repository import find
from ckptman.storage.base import Storage


@click.command(short_help="Delete checkpoints for good.")
@root_argument(required=True)
@click.argument("steps", metavar="STEP...", type=Step(), nargs=-1, required=True)
@yes_option
@lock_timeout_option
@json_option
def delete(
    storage: Storage, steps: tuple[int | str, ...], *, is_sure: bool, lock_timeout_s: float, as_json: bool
) -> None:
    """Delete the checkpoints STEP..., tagged or not, and their files. If one does not exist, none is deleted."""
    entries = entries_to_change(storage)
    numbers = [find(entries, step, storage.url).step for step in steps]
    change = deleting(numbers, storage.url)
    drop(storage, change, verb="delete", lock_timeout_s=lock_timeout_s, is_sure=is_sure, as_json=as_json)
