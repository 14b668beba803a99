"""``ckptman prune``: keep what a rule keeps, drop the rest."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, cast

import click

from ckptman.cli._arguments import Amount, json_option, lock_timeout_option, root_argument, yes_option
from ckptman.cli._changing import entries_to_change
from ckptman.cli._dropping import drop
from ckptman.repository import keep
from ckptman.repository.changes import pruning
from ckptman.repository.keep import Keep, Mode
from ckptman.storage.base import Storage

if TYPE_CHECKING:
    RuleType = click.ParamType[Keep]
else:  # click has generic types since 8.4 only
    RuleType = click.ParamType


class Best(RuleType):
    """``METRIC:N`` or ``METRIC:N:max``. A metric's name may have colons of its own."""

    name = "best"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Keep:
        rest, _, last = str(value).rpartition(":")
        text, mode = (rest, last) if last in ("min", "max") else (str(value), "min")
        metric, _, n = text.rpartition(":")
        if not metric or not n.isdecimal() or int(n) < 1:
            self.fail(f"{value!r} is not METRIC:N or METRIC:N:max, such as loss:2", param, ctx)
        return keep.best(metric, int(n), cast("Mode", mode))


_PERIOD = Amount(min=0, min_open=True)


@click.command(short_help="Delete all that no rule keeps.")
@root_argument()
@click.option("--last", metavar="N", type=click.IntRange(min=1), help="Keep the N most recently committed.")
@click.option(
    "--best", "best", metavar="METRIC:N[:max]", type=Best(), multiple=True, help="Keep the N best; repeatable."
)
@click.option("--every", metavar="STEPS", type=click.IntRange(min=1), help="Keep multiples of STEPS.")
@click.option("--hours", metavar="H", type=_PERIOD, help="Keep the last one of every H hours.")
@click.option("--days", metavar="D", type=_PERIOD, help="Keep the last one of every D days.")
@yes_option
@lock_timeout_option
@json_option
def prune(
    storage: Storage,
    *,
    last: int | None,
    best: tuple[Keep, ...],
    every: int | None,
    hours: float | None,
    days: float | None,
    is_sure: bool,
    lock_timeout_s: float,
    as_json: bool,
) -> None:
    """
    Delete the checkpoints that no rule keeps.

    Rules add up: what any of them keeps stays, and so do the latest checkpoint and tagged ones.
    """
    rules = [
        *([keep.last(last)] if last else []),
        *best,
        *([keep.every(every)] if every else []),
        *([keep.hours(hours)] if hours else []),
        *([keep.days(days)] if days else []),
    ]
    if not rules:
        raise click.UsageError("say what to keep: --last, --best, --every, --hours or --days")
    attempts = {entry.attempt for entry in entries_to_change(storage)}
    change = pruning(functools.reduce(operator.or_, rules), storage.url, attempts=attempts)
    drop(storage, change, verb="prune", lock_timeout_s=lock_timeout_s, is_sure=is_sure, as_json=as_json)
