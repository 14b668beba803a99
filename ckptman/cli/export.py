"""``ckptman export``: a checkpoint of a root becomes one of another tool."""

from __future__ import annotations

from pathlib import Path

import click

from ckptman.cli._arguments import Step, json_option, root_argument
from ckptman.cli._progress import progress_of_all
from ckptman.cli._render import note, print_json, print_text, size
from ckptman.errors import CkptmanError
from ckptman.storage.base import Storage

FORMATS = ("hf", "safetensors", "torch", "dcp")


@click.command(short_help="Write one for another tool.")
@root_argument(required=True)
@click.argument("step", type=Step())
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", "to", type=click.Choice(FORMATS), required=True, help="The format.")
@click.option("--component", "components", metavar="NAME", multiple=True, help="Only this one; may be repeated.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A config.json, for hf.")
@json_option
def export(
    storage: Storage,
    step: int | str,
    out: Path,
    *,
    to: str,
    components: tuple[str, ...],
    config: Path | None,
    as_json: bool,
) -> None:
    """
    Write the checkpoint STEP of ROOT to OUT, a new file (torch, safetensors) or directory (hf, dcp).

    Every byte is checked on the way. OUT appears when it is complete.
    """
    from ckptman.convert import export_checkpoint  # late: it needs torch

    try:
        with progress_of_all(is_shown=not as_json) as tell:
            done = export_checkpoint(
                storage, step, out, to=to, components=components or None, config=config, progress=tell
            )
    except ValueError as error:
        if isinstance(error, CkptmanError):
            raise
        raise click.ClickException(f"{error}. Nothing was exported") from error
    if as_json:
        print_json(
            {
                "root": storage.url,
                "step": done.checkpoint.step,
                "path": str(done.path),
                "to": to,
                "nbytes": done.nbytes,
                "components": list(done.components),
                "left_out": list(done.left_out),
            }
        )
        return
    for sentence in done.left_out:
        note(f"left out: {sentence}")
    print_text(f"exported step {done.checkpoint.step} to {done.path}: {size(done.nbytes)}")
