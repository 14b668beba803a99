"""``ckptman log``: how it came that what exists exists."""

from __future__ import annotations

import click

from ckptman.cli._arguments import json_option, root_argument
from ckptman.cli._documents import time_text
from ckptman.cli._render import note, print_json, table
from ckptman.format.catalog import Record
from ckptman.repository.head import read_history
from ckptman.storage.base import Storage


@click.command(short_help="The history: saves, prunes, takeovers.")
@root_argument()
@json_option
def log(storage: Storage, *, as_json: bool) -> None:
    """Show the history of ROOT, oldest change first: saves, prunes, takeovers. The newest 100 records are kept."""
    history = list(read_history(storage))
    if as_json:
        print_json({"root": storage.url, "records": [_document(number, record) for number, record in history]})
    elif history:
        table(["record>", "time (UTC)", "change", "writer", "epoch>"], [_row(*one) for one in history])
    else:
        note(f"{storage.url} has no history")


def _document(number: int, record: Record | None) -> dict[str, object]:
    if record is None:
        return {"number": number, "committed_at": None, "change": None, "writer": None, "damaged": True}
    writer = record.writer
    return {
        "number": number,
        "committed_at": time_text(record.committed_at),
        "change": record.change,
        "writer": {"host": writer.host, "pid": writer.pid, "epoch": writer.epoch},
        "damaged": False,
    }


def _row(number: int, record: Record | None) -> list[str]:
    if record is None:
        return [str(number), "", "(this record is damaged)", "", ""]
    writer = record.writer
    return [
        str(number),
        f"{record.committed_at:%Y-%m-%d %H:%M:%S}",
        record.change,
        f"{writer.host}:{writer.pid}",
        str(writer.epoch),
    ]
