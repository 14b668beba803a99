"""Dropping checkpoints: what ``prune`` and ``delete`` have in common."""

from __future__ import annotations

from collections.abc import Sequence

from ckptman.cli._changing import apply, confirm, entries_to_change, freeable_nbytes, refuse_unsure
from ckptman.cli._render import count, note, print_json, print_text, size, steps_named
from ckptman.cli.ls import print_checkpoints
from ckptman.format.catalog import Entry
from ckptman.repository.commit import Change
from ckptman.repository.repository import checkpoint_of
from ckptman.storage.base import Storage


def drop(
    storage: Storage,
    change: Change,
    *,
    verb: str,
    lock_timeout_s: float,
    is_sure: bool,
    as_json: bool,
) -> None:
    """
    Show which checkpoints *change* drops, ask, commit it, and report what was dropped and freed.

    Nothing is written, and nobody asked, where it drops nothing.
    """
    entries = entries_to_change(storage)
    left = change(entries)
    dropped = _without(entries, left)
    nbytes = {entry.attempt: freeable_nbytes(storage, left, [entry.attempt]) for entry in dropped}
    if dropped:
        if not (is_sure or as_json):
            _show(storage, dropped, sum(nbytes.values()))
        refuse_unsure(is_sure=is_sure, as_json=as_json)
        confirm(f"Delete {count(len(dropped), 'checkpoint')} for good?", is_sure=is_sure)
        apply(storage, change, f"{verb}: {steps_named([e.step for e in dropped])}", timeout_s=lock_timeout_s)
        left = entries_to_change(storage)
        dropped = _without(dropped, left)
    kept_nbytes = freeable_nbytes(storage, left, nbytes)  # what could not be deleted: the next writer will
    freed_nbytes = sum(nbytes[entry.attempt] for entry in dropped) - kept_nbytes
    _report(storage, dropped, freed_nbytes, as_json=as_json)


def _without(entries: Sequence[Entry], left: Sequence[Entry]) -> list[Entry]:
    attempts = {entry.attempt for entry in left}
    return [entry for entry in entries if entry.attempt not in attempts]


def _show(storage: Storage, dropped: Sequence[Entry], freed_nbytes: int) -> None:
    note(f"would delete from {storage.url}, and free {size(freed_nbytes)}:")
    print_checkpoints([checkpoint_of(entry, storage.url) for entry in dropped], is_note=True)


def _report(storage: Storage, dropped: Sequence[Entry], freed_nbytes: int, *, as_json: bool) -> None:
    steps = [entry.step for entry in dropped]
    if as_json:
        print_json({"root": storage.url, "dropped": steps, "freed_nbytes": freed_nbytes})
    elif steps:
        print_text(f"deleted {count(len(steps), 'checkpoint')} ({steps_named(steps)}), freed {size(freed_nbytes)}")
    else:
        note("nothing to delete")
