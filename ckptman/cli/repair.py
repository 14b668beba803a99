"""``ckptman repair``: list again what a damaged catalog lost."""

from __future__ import annotations

from collections.abc import Iterator

import click

from ckptman.cli._arguments import json_option, lock_timeout_option, root_argument, yes_option
from ckptman.cli._changing import confirm, refuse_missing, refuse_unsure
from ckptman.cli._render import note, print_json, print_text, steps_text
from ckptman.repository.repair import Diagnosis, diagnose
from ckptman.repository.repair import repair as repair_root
from ckptman.storage.base import Storage


@click.command(short_help="Rebuild a lost or damaged catalog.")
@root_argument()
@yes_option
@lock_timeout_option
@json_option
def repair(storage: Storage, *, is_sure: bool, lock_timeout_s: float, as_json: bool) -> None:
    """
    Rebuild the catalog where it is lost or damaged, from the manifests that every checkpoint carries.

    Damaged data cannot be repaired: 'ckptman verify' finds it, and 'ckptman delete' drops such checkpoints.
    """
    refuse_missing(storage)
    found = diagnose(storage)
    if not found.is_healthy:
        if not (is_sure or as_json):
            note(f"would repair {storage.url}:\n" + "\n".join(_sentences(found)))
        refuse_unsure(is_sure=is_sure, as_json=as_json)
        confirm("Repair it?", is_sure=is_sure)
        found = repair_root(storage, timeout_s=lock_timeout_s)
    if as_json:
        print_json(_document(storage, found))
    elif found.is_healthy:
        note("nothing to repair")
    else:
        print_text("repaired:\n" + "\n".join(_sentences(found)))


def _document(storage: Storage, found: Diagnosis) -> dict[str, object]:
    return {
        "root": storage.url,
        "marker": found.marker,
        "damaged_records": list(found.damaged_records),
        "adopted": [entry.step for entry in found.adopted],
        "incomplete": list(found.incomplete),
    }


def _sentences(found: Diagnosis) -> Iterator[str]:
    if found.marker is not None:
        yield f"  {found.marker}: a new one is written"
    if found.damaged_records:
        yield f"  damaged catalog records are superseded: {steps_text(found.damaged_records)}"
    if found.adopted:
        yield f"  checkpoints are listed again: {steps_text(entry.step for entry in found.adopted)}"
    for attempt in found.incomplete:
        yield f"  {attempt} is incomplete or damaged: its files are deleted"
