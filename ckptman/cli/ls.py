"""``ckptman ls``: what exists."""

from __future__ import annotations

import click

from ckptman.cli._arguments import json_option, root_argument
from ckptman.cli._documents import checkpoint_document
from ckptman.cli._render import age, note, print_json, size, table
from ckptman.repository.repository import Repository
from ckptman.storage.base import Storage
from ckptman.types import Checkpoint


@click.command(short_help="List the checkpoints.")
@root_argument()
@json_option
def ls(storage: Storage, *, as_json: bool) -> None:
    """List the checkpoints of ROOT, oldest commit first: the last one is the latest."""
    checkpoints = Repository(storage).checkpoints()
    if as_json:
        print_json({"root": storage.url, "checkpoints": [checkpoint_document(one) for one in checkpoints]})
    elif checkpoints:
        print_checkpoints(checkpoints)
    else:
        note(f"{storage.url} has no checkpoint")


def print_checkpoints(checkpoints: list[Checkpoint], *, is_note: bool = False) -> None:
    """A row for each of *checkpoints*."""
    table(["step>", "saved", "size>", "new>", "metrics", "tags"], map(_row, checkpoints), is_note=is_note)


def _row(checkpoint: Checkpoint) -> list[str]:
    return [
        str(checkpoint.step),
        age(checkpoint.created_at),
        size(checkpoint.nbytes),
        size(checkpoint.new_nbytes),
        metrics_text(checkpoint),
        ", ".join([*checkpoint.tags, *(["(preempted)"] if checkpoint.preempted else [])]),
    ]


def metrics_text(checkpoint: Checkpoint) -> str:
    """``loss=2.31 accuracy=0.5``."""
    return " ".join(f"{name}={value:.4g}" for name, value in checkpoint.metrics.items())
