"""``ckptman latest``: the newest checkpoint, for scripts."""

from __future__ import annotations

import click

from ckptman.cli._arguments import json_option, root_argument
from ckptman.cli._documents import checkpoint_document
from ckptman.cli._render import print_json, print_text
from ckptman.repository.repository import Repository, find
from ckptman.storage.base import Storage


@click.command(short_help="Print the step of the newest one; for scripts.")
@root_argument()
@json_option
def latest(storage: Storage, *, as_json: bool) -> None:
    """Print the step of the most recently committed checkpoint; exit with 3 if there is none."""
    repository = Repository(storage)
    checkpoint = repository.checkpoint(find(repository.entries(), "latest", storage.url))
    if as_json:
        print_json({**checkpoint_document(checkpoint), "preempted": checkpoint.preempted})
    else:
        print_text(str(checkpoint.step))
