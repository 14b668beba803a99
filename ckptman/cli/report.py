"""``ckptman report``: a root on one page that can be sent around."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

import click

from ckptman.cli import _charts as charts
from ckptman.cli._arguments import json_option, root_argument
from ckptman.cli._documents import time_text
from ckptman.cli._render import count, print_json, print_text, printable, size
from ckptman.cli.ls import metrics_text
from ckptman.errors import StorageError
from ckptman.format.manifest import Manifest
from ckptman.repository.commit import utc_now
from ckptman.repository.repository import Repository, find
from ckptman.storage.base import Storage
from ckptman.storage.opening import local_path
from ckptman.types import Checkpoint

STYLE = """
  :root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #fff; --blue: #0969da }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d; --paper: #0d1117; --blue: #4493f8 }
  }
  body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--paper);
         max-width: 920px; margin: 32px auto; padding: 0 20px }
  h1 { font-size: 22px; overflow-wrap: anywhere; margin: 0 } h2 { font-size: 16px; margin: 32px 0 8px }
  p { color: var(--soft); margin: 4px 0 } svg { width: 100%; height: auto; display: block }
  .wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 13px }
  th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
  .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
  .key { display: inline-block; width: 11px; height: 11px; margin: 0 5px 0 14px; border-radius: 2px }
  text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink) } .small { fill: var(--soft) }
  .grid { stroke: var(--line) } .bar.all { fill: var(--line) } .bar.new, .point { fill: var(--blue) }
  .tag { fill: #bc4c00 } .line { fill: none; stroke: var(--blue); stroke-width: 1.5 }
  .cell-name, .cell-size { fill: #ffffff } .cell-size { opacity: .8 }
  .hue0 { fill: #0969da; background: #0969da } .hue1 { fill: #1a7f37; background: #1a7f37 }
  .hue2 { fill: #8250df; background: #8250df } .hue3 { fill: #9a6700; background: #9a6700 }
  .hue4 { fill: #bf3989; background: #bf3989 } .hue5 { fill: #1b7c83; background: #1b7c83 }
  .hue6 { fill: #6e7781; background: #6e7781 }
"""


@click.command(short_help="One page: timeline, sizes, metrics, tensors.")
@root_argument()
@click.option(
    "--output", "-o", metavar="FILE", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The page."
)
@json_option
def report(storage: Storage, output: Path, *, as_json: bool) -> None:
    """Write a page about ROOT to FILE: HTML that needs nothing else and runs nothing. An older FILE is replaced."""
    try:
        local_path(output)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    repository = Repository(storage)
    entries = repository.entries()
    newest = find(entries, "latest", storage.url)
    checkpoints = [repository.checkpoint(entry) for entry in entries]
    page = "".join(_page(storage.url, checkpoints, repository.manifest(newest)))
    _replace(output, page.encode())
    if as_json:
        print_json({"root": storage.url, "path": str(output), "checkpoints": len(checkpoints)})
    else:
        print_text(f"wrote {output}: {count(len(checkpoints), 'checkpoint')}")


def _page(url: str, checkpoints: Sequence[Checkpoint], newest: Manifest) -> Iterator[str]:
    title = _text(url)
    yield f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
    yield '<meta name="viewport" content="width=device-width">\n'
    yield f"<style>{STYLE}</style>\n<h1>{title}</h1>\n"
    written = sum(one.new_nbytes for one in checkpoints)
    now = time_text(utc_now().replace(microsecond=0))
    yield f"<p>{count(len(checkpoints), 'checkpoint')}, {size(written)} written for them. As of {now}.</p>\n"
    yield "<h2>Timeline</h2>\n<p>Bytes of each checkpoint, in the order of their commits. Blue: written by it; grey: "
    yield f"shared with earlier ones. A dot: tagged.</p>\n{charts.timeline(checkpoints)}\n"
    for name in dict.fromkeys(name for one in checkpoints for name in one.metrics):
        yield f"<h2>{_text(name)}</h2>\n{charts.metric(name, checkpoints)}\n"
    yield f"<h2>Tensors of step {newest.step}</h2>\n<p>{size(newest.nbytes)} in {count(len(newest.tensors), 'tensor')}:"
    for name, hue in charts.legend(newest).items():
        yield f'<span class="key hue{hue}"></span>{_text(name)}'
    yield f"</p>\n{charts.tensor_map(newest)}\n<h2>Checkpoints</h2>\n"
    yield from _table(checkpoints)
    yield "</html>\n"


def _table(checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    yield '<div class="wide"><table>\n<tr><th class="number">step<th>saved (UTC)<th class="number">size'
    yield '<th class="number">new<th>metrics<th>tags</tr>\n'
    for one in reversed(checkpoints):
        yield f'<tr><td class="number">{one.step}<td>{one.created_at:%Y-%m-%d %H:%M:%S}'
        yield f'<td class="number">{size(one.nbytes)}<td class="number">{size(one.new_nbytes)}'
        yield f"<td>{_text(metrics_text(one))}<td>{_text(', '.join(one.tags))}</tr>\n"
    yield "</table></div>\n"


def _text(text: str) -> str:
    return escape(printable(text))


def _replace(path: Path, data: bytes) -> None:
    """Put *data* at *path*, whole or not at all. Not durable: it can be written again."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError.from_os(error, f"writing {os.fspath(path)}") from error
