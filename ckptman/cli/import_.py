"""``ckptman import``: a checkpoint of another tool becomes one of a root."""

from __future__ import annotations

from pathlib import Path

import click

from ckptman.cli._arguments import json_option, lock_timeout_option, root_argument
from ckptman.cli._documents import checkpoint_document
from ckptman.cli._progress import progress_of_all
from ckptman.cli._render import count, note, print_json, print_text, size
from ckptman.errors import CkptmanError
from ckptman.storage.base import Storage


@click.command("import", short_help="Take in a checkpoint of another tool.")
@root_argument(required=True)
@click.argument("source", metavar="SRC", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--step", metavar="STEP", type=click.IntRange(min=0), help="The step it becomes, where SRC does not say it."
)
@click.option(
    "--as", "kinds", metavar="NAME=KIND", multiple=True, help="What component NAME is: module, stateful, container, …"
)
@click.option(
    "--partial", is_flag=True, help="Import a directory that lacks its optimizer, schedule or random streams."
)
@lock_timeout_option
@json_option
def import_(
    storage: Storage,
    source: Path,
    *,
    step: int | None,
    kinds: tuple[str, ...],
    partial: bool,
    lock_timeout_s: float,
    as_json: bool,
) -> None:
    """
    Import SRC into ROOT: a file of torch.save or Lightning, safetensors, or a directory of Hugging Face, accelerate or
    torch.distributed.checkpoint. Nothing is unpickled; what would have to be is refused.
    """
    from ckptman.convert import import_checkpoint  # late: it needs torch

    try:
        with progress_of_all(is_shown=not as_json) as tell:
            found = import_checkpoint(
                storage,
                source,
                step=step,
                kinds=_pairs(kinds),
                partial=partial,
                lock_timeout=lock_timeout_s,
                progress=tell,
            )
    except ValueError as error:
        if isinstance(error, CkptmanError):
            raise
        raise click.ClickException(f"{error}. Nothing was imported") from error
    if as_json:
        document = checkpoint_document(found.checkpoint)
        print_json({**document, "format": found.format, "components": found.kinds, "left_out": list(found.left_out)})
        return
    for sentence in found.left_out:
        note(f"left out: {sentence}")
    parts = ", ".join(f"{name} ({kind})" for name, kind in found.kinds.items())
    print_text(
        f"imported {found.format} as step {found.checkpoint.step}: {size(found.checkpoint.nbytes)} in "
        f"{count(len(found.kinds), 'component')}: {parts}"
    )


def _pairs(kinds: tuple[str, ...]) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in kinds]
    if not all(name and kind for name, _, kind in pairs):
        raise click.UsageError("--as wants NAME=KIND, such as --as ema=container")
    return {name: kind for name, _, kind in pairs}
