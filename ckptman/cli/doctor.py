"""``ckptman doctor``: what a storage does and costs, measured."""

from __future__ import annotations

from collections.abc import Iterable

import click

from ckptman.cli._arguments import Amount, RootText, json_option
from ckptman.cli._render import print_json, table
from ckptman.doctor.examining import examine
from ckptman.doctor.findings import Finding
from ckptman.errors import StorageError
from ckptman.storage.base import Storage

MARKS = {"ok": "✓", "bad": "✗", "unknown": "–"}
COLOURS = {"✓": "bold green", "✗": "bold red", "–": "yellow"}


@click.command(short_help="Measure whether a storage can be trusted, and what it costs.")
@click.argument("root", metavar="[ROOT]", type=RootText(), default="-")
@click.option(
    "--nodes", metavar="N", type=click.IntRange(min=2), help="Run on N machines at once: do all see the same root?"
)
@click.option("--timeout", "timeout_s", metavar="SECONDS", type=Amount(min=0), default=60.0,
              show_default=True, help="How long to wait for the other machines.")  # fmt: skip
@json_option
def doctor(root: tuple[str, Storage], *, nodes: int | None, timeout_s: float, as_json: bool) -> None:
    """
    Measure what the storage of ROOT does, instead of believing it, and what that costs.

    It may run beside a job that saves there, and on a ROOT that does not exist yet. Nothing stays behind. With
    --nodes, start it on so many machines within the timeout.

    Exits with 1 if anything is bad.
    """
    text, storage = root
    findings = list(examine(storage, text, nodes=nodes, timeout_s=timeout_s))
    ok = all(finding.verdict != "bad" for finding in findings)
    if as_json:
        print_json({"root": storage.url, "ok": ok, "findings": list(map(_document, findings))})
    else:
        _print(findings)
    if not ok:
        raise click.exceptions.Exit(StorageError.exit_code)


def _document(finding: Finding) -> dict[str, object]:
    return {
        "name": finding.name,
        "verdict": finding.verdict,
        "what": finding.what,
        "figures": dict(finding.figures),
    }


def _print(findings: Iterable[Finding]) -> None:
    rows = [[MARKS[finding.verdict], finding.name, finding.what] for finding in findings]
    table(["", "", ""], rows, styles=COLOURS)
