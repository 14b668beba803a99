"""
The catalog record: everything that exists in a root after its n-th change.

The record with the highest number is the truth. Records are immutable and form a chain: each holds the sha256 of
the one before it, and each checkpoint's entry holds the sha256 of its manifest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from ckptman.errors import FormatError
from ckptman.format.fields import Count, Utc, check_utc
from ckptman.format.manifest import Manifest
from ckptman.format.metrics import JsonMetrics, check_metrics
from ckptman.format.names import FORMAT, check_attempt, check_component, check_data_key, check_tag, is_attempt_at
from ckptman.format.sealed import Torn, seal, unseal
from ckptman.storage.base import Buffer

MAX_RECORD_NBYTES = 256 << 20

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Writer(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Who wrote a record. ``epoch`` counts the root's writers; ``id`` is random; ``since`` is its first commit."""

    epoch: Annotated[int, msgspec.Meta(ge=1)]
    id: str
    host: str
    pid: Count
    since: Utc


class Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A checkpoint that exists. ``after`` is its manifest's; ``borrows`` are files of other attempts that it needs."""

    step: Count
    attempt: str
    manifest: Sha256
    after: Count
    created_at: Utc
    nbytes: Count
    new_nbytes: Count
    world_size: Count
    components: tuple[str, ...]
    metrics: JsonMetrics = {}
    tags: tuple[str, ...] = ()
    borrows: tuple[str, ...] = ()
    preempted: bool = False


class Record(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """
    The state of a root after change ``number``. ``checkpoints`` are in the order of their commits, oldest first.

    ``nonce`` is fresh for every try at a change: it tells our own record, put by a try whose answer was lost, from
    another writer's. ``previous`` is the sha256 of the record below, None for the first one or after a repair.
    """

    format: int = FORMAT
    root: str
    number: Annotated[int, msgspec.Meta(ge=1, le=10**12 - 1)]
    committed_at: Utc
    writer: Writer
    change: str
    nonce: str
    previous: Sha256 | None
    checkpoints: tuple[Entry, ...]


def entry_of(manifest: Manifest, manifest_sha256: str, *, tags: tuple[str, ...] = ()) -> Entry:
    """How the catalog lists the checkpoint of *manifest*."""
    return Entry(
        step=manifest.step,
        attempt=manifest.attempt,
        manifest=manifest_sha256,
        after=manifest.after,
        created_at=manifest.created_at,
        nbytes=manifest.nbytes,
        new_nbytes=manifest.new_nbytes,
        world_size=manifest.world_size,
        components=manifest.shared_components,
        metrics=manifest.metrics,
        tags=tags,
        borrows=manifest.borrows,
        preempted=manifest.preempted,
    )


def write_record(record: Record) -> bytes:
    """The bytes of the record's file. Reads them again: what cannot be read is never written. Raises FormatError."""
    data = seal(record)
    read_record(data, record.number)
    return data


def read_record(data: Buffer, number: int) -> Record:
    """
    The record in *data*, which was found under *number*.

    Raises:
        Torn: The bytes differ from what was written there; also those of another record, whose file was renamed.
        FormatError: A rule of the format is broken, or the format is newer.
    """
    what = f"catalog record {number}"
    return _checked(unseal(data, Record, what), number, what)


class _Outline(Record, forbid_unknown_fields=True, frozen=True, kw_only=True):
    checkpoints: tuple[msgspec.Raw, ...]  # type: ignore[assignment]  # not looked into


def read_newest(data: Buffer, number: int) -> Record:
    """
    The record in *data* as `read_record` gives it, but of its checkpoints the newest alone, if there is one.

    For looking at the newest of very many; nothing may be built on it. The others are covered by the record's digest,
    and otherwise not checked.

    Raises:
        Torn, FormatError: As `read_record`.
    """
    what = f"catalog record {number}"
    outline = unseal(data, _Outline, what)
    try:
        newest = tuple(msgspec.json.decode(raw, type=Entry) for raw in outline.checkpoints[-1:])
    except msgspec.MsgspecError as error:
        raise FormatError(f"{what} breaks the format: {error}") from error
    return _checked(Record(**{**msgspec.structs.asdict(outline), "checkpoints": newest}), number, what)


def _checked(record: Record, number: int, what: str) -> Record:
    _check(record, what)
    if record.number != number:
        raise Torn(f"{what} was written as record {record.number}: was the file renamed?")
    return record


def _check(record: Record, what: str) -> None:
    try:
        check_utc(record.committed_at, record.writer.since)
        steps: set[int] = set()
        tags: set[str] = set()
        for entry in record.checkpoints:
            if entry.step in steps:
                raise FormatError(f"step {entry.step} is listed twice")
            steps.add(entry.step)
            if entry.tags and (tags.intersection(entry.tags) or len(set(entry.tags)) != len(entry.tags)):
                raise FormatError(f"a tag of step {entry.step} is given twice")
            tags.update(entry.tags)
        _check_entries(record.checkpoints)
    except ValueError as error:  # FormatError is one
        raise FormatError(f"{what} breaks the format: {error}") from error


def _check_entries(entries: Iterable[Entry]) -> None:
    """What is to be asked of each entry by itself; of the thousands of a catalog, most say what another one said."""
    components: set[tuple[str, ...]] = set()
    for entry in entries:
        if not is_attempt_at(entry.attempt, entry.step):
            raise FormatError(f"step {entry.step} is said to lie in {check_attempt(entry.attempt)}")
        if entry.components not in components:
            components.add(entry.components)
            for component in entry.components:
                check_component(component)
        for tag in entry.tags:
            check_tag(tag)
        check_utc(entry.created_at)
        check_metrics(entry.metrics)
        for key in entry.borrows:
            check_data_key(key)
