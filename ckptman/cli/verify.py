"""``ckptman verify``: every byte is read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from ckptman.cli._arguments import Step, json_option, root_argument
from ckptman.cli._catalog import catalog_faults
from ckptman.cli._changing import refuse_missing
from ckptman.cli._progress import progress_bar
from ckptman.cli._render import count, print_json, print_text, size, table
from ckptman.errors import IntegrityError
from ckptman.format.catalog import Entry
from ckptman.repository.repository import Repository, find
from ckptman.repository.verify import Fault, Progress
from ckptman.repository.verify import verify as verify_checkpoint
from ckptman.storage.base import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is wrong with one checkpoint; nothing, if it is intact."""

    entry: Entry
    faults: Sequence[Fault]


@click.command(short_help="Read and check every byte.")
@root_argument()
@click.argument("step", metavar="[STEP]", type=Step(), required=False)
@json_option
def verify(storage: Storage, step: int | str | None, *, as_json: bool) -> None:
    """
    Read and check every byte of the checkpoint STEP (default: of all), and the catalog.

    Exits with 4 if anything is damaged, and names it: the file, and the tensor.
    """
    refuse_missing(storage)
    repository = Repository(storage)
    catalog = catalog_faults(storage)
    entries = repository.entries()
    chosen = entries if step is None else (find(entries, step, storage.url),)
    with progress_bar(sum(entry.nbytes for entry in chosen)) as progress:
        verdicts = [verdict for entry in chosen if (verdict := _verdict(repository, entry, progress))]
    if as_json:
        print_json(_document(storage, catalog, verdicts))
    else:
        _print(catalog, verdicts)
    if catalog or any(verdict.faults for verdict in verdicts):
        raise click.exceptions.Exit(IntegrityError.exit_code)


def _verdict(repository: Repository, entry: Entry, progress: Progress) -> Verdict | None:
    """None where a live writer dropped the checkpoint while we were reading it."""
    faults = verify_checkpoint(repository, entry, progress=progress)
    if faults and entry.attempt not in {one.attempt for one in repository.entries()}:
        return None
    return Verdict(entry=entry, faults=faults)


def _document(storage: Storage, catalog: Sequence[Fault], verdicts: Sequence[Verdict]) -> dict[str, object]:
    return {
        "root": storage.url,
        "ok": not catalog and not any(verdict.faults for verdict in verdicts),
        "catalog": {"ok": not catalog, "faults": [_fault_document(fault) for fault in catalog]},
        "checkpoints": [
            {
                "step": verdict.entry.step,
                "ok": not verdict.faults,
                "faults": [_fault_document(fault) for fault in verdict.faults],
            }
            for verdict in verdicts
        ],
    }


def _fault_document(fault: Fault) -> dict[str, object]:
    return {"file": fault.file, "tensor": fault.tensor, "what": fault.what}


def _print(catalog: Sequence[Fault], verdicts: Sequence[Verdict]) -> None:
    if verdicts:
        table(["step>", "size>", "verdict"], [_row(verdict) for verdict in verdicts])
    bad = [*catalog, *(fault for verdict in verdicts for fault in verdict.faults)]
    damaged = sum(bool(verdict.faults) for verdict in verdicts)
    if not bad:
        print_text(f"{count(len(verdicts), 'checkpoint')} and the catalog intact")
        return
    for fault in bad:
        print_text(f"damaged: {fault.what}")
    print_text(
        f"{damaged} of {count(len(verdicts), 'checkpoint')} damaged, catalog {'damaged' if catalog else 'intact'}"
    )


def _row(verdict: Verdict) -> list[str]:
    return [
        str(verdict.entry.step),
        size(verdict.entry.nbytes),
        count(len(verdict.faults), "fault") if verdict.faults else "intact",
    ]
