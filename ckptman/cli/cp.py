"""``ckptman cp``: checkpoints from one root to another, whatever both are stored on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import click

from ckptman.cli._arguments import Root, Step, json_option, lock_timeout_option
from ckptman.cli._changing import refuse_missing
from ckptman.cli._progress import Advance, progress_bar
from ckptman.cli._render import count, note, print_json, print_text, size, steps_named
from ckptman.errors import CheckpointNotFound, IntegrityError
from ckptman.format.catalog import Entry
from ckptman.pipeline.copying import Copying, begin
from ckptman.repository.counterparts import counterpart, in_the_way, missing
from ckptman.repository.repository import Repository, find
from ckptman.storage.base import Storage

Outcome = Literal["copied", "there", "gone", "damaged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one checkpoint. ``what`` says what is wrong with a damaged one."""

    step: int
    outcome: Outcome
    sent_nbytes: int = 0
    what: str | None = None


@click.command(short_help="Copy checkpoints to another root.")
@click.argument("source", metavar="SRC", type=Root())
@click.argument("target", metavar="DST", type=Root())
@click.option(
    "--step", "steps", metavar="STEP", type=Step(), multiple=True, help="Copy only this one; may be repeated."
)
@click.option("--replace", "replaces", is_flag=True, help="Replace other checkpoints of DST that have the same step.")
@lock_timeout_option
@json_option
def cp(
    source: Storage,
    target: Storage,
    *,
    steps: tuple[int | str, ...],
    replaces: bool,
    lock_timeout_s: float,
    as_json: bool,
) -> None:
    """
    Copy all checkpoints of the root SRC, or those given with --step, to the root DST, which is made if need be.

    Every byte is checked on its way. What DST has already is not sent again, so a copying that was cut short is
    continued by the same command. Each checkpoint appears in DST whole, or not at all. Metrics and tags go with it.
    """
    if source.identity == target.identity:
        raise click.UsageError(f"SRC and DST are the same root, {source.url}")
    refuse_missing(source)
    entries = Repository(source).entries()
    chosen = _chosen(entries, steps, source.url)
    there = Repository(target).entries()
    if not replaces:
        _refuse_to_replace(chosen, there, target.url)
    results = [Result(step=entry.step, outcome="there") for entry in chosen]
    if missing(chosen, there) or any(_lacks_tags(entry, there) for entry in chosen):
        copying = begin(source, target, timeout_s=lock_timeout_s)
        try:
            with progress_bar(sum(entry.nbytes for entry in chosen)) as advance:
                results = [
                    _copy(copying, source, entry, entries, replaces=replaces, advance=advance) for entry in chosen
                ]
            copying.tidy()
        finally:
            copying.release()
    _report(source, target, results, as_json=as_json)
    if any(result.outcome == "damaged" for result in results):
        raise click.exceptions.Exit(IntegrityError.exit_code)


def _chosen(entries: Sequence[Entry], steps: Iterable[int | str], url: str) -> list[Entry]:
    """Those that *steps* mean (none: all), in the order of their commits. Raises `CheckpointNotFound`."""
    if not entries:
        raise CheckpointNotFound(f"{url} has no checkpoint to copy")
    wanted = {find(entries, step, url).step for step in steps}
    return [entry for entry in entries if not wanted or entry.step in wanted]


def _refuse_to_replace(chosen: Sequence[Entry], there: Sequence[Entry], url: str) -> None:
    others = in_the_way(chosen, there)
    if others:
        steps = steps_named([entry.step for entry in others])
        raise click.UsageError(f"nothing was copied: {url} has other checkpoints at {steps}; --replace drops them")


def _lacks_tags(entry: Entry, there: Sequence[Entry]) -> bool:
    copy = counterpart(entry, there)
    return copy is not None and not set(entry.tags) <= set(copy.tags)


def _copy(
    copying: Copying, source: Storage, entry: Entry, entries: Sequence[Entry], *, replaces: bool, advance: Advance
) -> Result:
    """One that is damaged, or that a live writer of SRC dropped meanwhile, keeps no other one from being copied."""
    try:
        copied = copying.copy(entry, entries, replace=replaces, progress=advance)
    except IntegrityError as error:
        if entry.attempt not in {one.attempt for one in Repository(source).entries()}:
            return Result(step=entry.step, outcome="gone")
        return Result(step=entry.step, outcome="damaged", what=str(error))
    return Result(step=entry.step, outcome="copied" if copied.is_new else "there", sent_nbytes=copied.sent_nbytes)


def _report(source: Storage, target: Storage, results: Sequence[Result], *, as_json: bool) -> None:
    if as_json:
        checkpoints = [
            {"step": one.step, "outcome": one.outcome, "sent_nbytes": one.sent_nbytes, "what": one.what}
            for one in results
        ]
        print_json({"source": source.url, "root": target.url, "checkpoints": checkpoints})
        return
    for result in results:
        if result.outcome == "damaged":
            print_text(f"damaged, and not copied: {result.what}")
        elif result.outcome == "gone":
            note(f"step {result.step} was dropped while it was copied")
    copied = [result.step for result in results if result.outcome == "copied"]
    if copied:
        sent = size(sum(result.sent_nbytes for result in results))
        print_text(f"copied {count(len(copied), 'checkpoint')} ({steps_named(copied)}), sent {sent}")
    else:
        note(f"nothing was copied: {count(sum(one.outcome == 'there' for one in results), 'checkpoint')} there already")
