"""``ckptman diff``: what changed from one checkpoint to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ckptman.cli._arguments import Step, json_option, root_argument
from ckptman.cli._documents import number_json
from ckptman.cli._render import count, print_json, print_text, table
from ckptman.cli._values import changed_values
from ckptman.format.manifest import Manifest
from ckptman.repository.diff import Difference, difference
from ckptman.repository.repository import Repository, find
from ckptman.storage.base import Storage

if TYPE_CHECKING:
    from ckptman.pipeline.compare import TensorChange

ValueChange = tuple[str, object, object]


@click.command(short_help="What changed from one to another.")
@root_argument(required=True)
@click.argument("a", metavar="A", type=Step())
@click.argument("b", metavar="B", type=Step())
@json_option
def diff(storage: Storage, a: int | str, b: int | str, *, as_json: bool) -> None:
    """
    Show what changed from checkpoint A to checkpoint B: tensors, and values.

    For each changed tensor: the largest change of an element, and the norm of the change relative to that of A.
    """
    from ckptman.pipeline.compare import compare  # late: it imports torch

    repository = Repository(storage)
    entries = repository.entries()
    old, new = (repository.manifest(find(entries, which, storage.url)) for which in (a, b))
    names = difference(old, new)
    changes = list(compare(storage, old, new, names.changed))
    values = _changed_values(old, new)
    if as_json:
        print_json(_document(names, changes, values))
    else:
        _print(names, changes, values)


def _changed_values(old: Manifest, new: Manifest) -> list[ValueChange]:
    found: list[ValueChange] = []
    for name in old.components.keys() & new.components.keys():
        pair = old.components[name].values, new.components[name].values
        found += [(f"{name}.{path.removeprefix('state.')}", x, y) for path, x, y in changed_values(*pair)]
    return sorted(found, key=lambda one: one[0])


def _document(names: Difference, changes: Sequence[TensorChange], values: Sequence[ValueChange]) -> dict[str, object]:
    return {
        "added": list(names.added),
        "removed": list(names.removed),
        "reshaped": list(names.reshaped),
        "changed": [
            {"name": one.name, "max_abs": number_json(one.max_abs), "relative": number_json(one.relative)}
            for one in changes
        ],
        "same": names.same,
        "values": [{"name": name, "a": x, "b": y} for name, x, y in values],
    }


def _print(names: Difference, changes: Sequence[TensorChange], values: Sequence[ValueChange]) -> None:
    for what, found in (("added", names.added), ("removed", names.removed), ("reshaped", names.reshaped)):
        for name in found:
            print_text(f"{what:<9} {name}")
    if changes:
        table(["changed tensor", "largest>", "relative>"], [_row(one) for one in changes])
    if values:
        print_text("")
        table(["changed value", "A", "B"], [(name, str(x), str(y)) for name, x, y in values])
    print_text(f"{count(len(changes), 'tensor')} changed, {names.same} the same")


def _row(change: TensorChange) -> list[str]:
    return [change.name, *("bytes" if one is None else f"{one:.3g}" for one in (change.max_abs, change.relative))]
