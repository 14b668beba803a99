"""``ckptman gc``: delete what saves that came to nothing left behind."""

from __future__ import annotations

import click

from ckptman.cli._arguments import json_option, lock_timeout_option, root_argument, yes_option
from ckptman.cli._changing import apply, confirm, entries_to_change, freeable_nbytes, refuse_unsure
from ckptman.cli._render import count, note, print_json, print_text, size
from ckptman.repository.head import attempts
from ckptman.storage.base import Storage


@click.command(short_help="Delete what unfinished saves left behind.")
@root_argument()
@yes_option
@lock_timeout_option
@json_option
def gc(storage: Storage, *, is_sure: bool, lock_timeout_s: float, as_json: bool) -> None:
    """
    Delete the files of saves that were cut short. No checkpoint is touched, and nothing that is not ckptman's.

    The next writer does the same by itself; this is for roots that have none. It never runs beside a live job.
    """
    entries = entries_to_change(storage)
    listed = {entry.attempt for entry in entries}
    lenders = {key.partition("/")[0] for entry in entries for key in entry.borrows}
    unlisted = [name for name in attempts(storage) if name not in listed]
    garbage = [name for name in unlisted if name not in lenders or freeable_nbytes(storage, entries, [name])]
    freed_nbytes = 0
    if garbage:
        freed_nbytes = freeable_nbytes(storage, entries, garbage)
        if not (is_sure or as_json):
            note(f"would delete from {storage.url}, and free {size(freed_nbytes)}:")
            note("\n".join(garbage))
        refuse_unsure(is_sure=is_sure, as_json=as_json)
        confirm(f"Delete {count(len(garbage), 'unfinished save')}?", is_sure=is_sure)
        apply(storage, tuple, f"gc: {count(len(garbage), 'unfinished save')}", timeout_s=lock_timeout_s)
        freed_nbytes -= freeable_nbytes(storage, entries_to_change(storage), garbage)
    if as_json:
        print_json({"root": storage.url, "attempts": garbage, "freed_nbytes": freed_nbytes})
    elif garbage:
        print_text(f"deleted {count(len(garbage), 'unfinished save')}, freed {size(freed_nbytes)}")
    else:
        note("nothing to free")
