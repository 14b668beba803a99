"""
The catalog record: everything that exists in a root after its n-th change.

The record with the highest number is the truth. Records are immutable and form a chain: each holds the sha256 of
the one before it, and each checkpoint's entry holds the sha256 of its manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import msgspec

from ckptman.errors import FormatError
from ckptman.format.fields import Count, Utc, are_hex, check_utc
from ckptman.format.manifest import Manifest
from ckptman.format.metrics import JsonMetrics, check_metrics
from ckptman.format.names import FORMAT, are_attempts_at, check_attempt, check_component, check_data_key, check_tag
from ckptman.format.sealed import Torn, seal, unseal
from ckptman.storage.base import Buffer

MAX_RECORD_NBYTES = 256 << 20

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]

_BEHIND = b',{"step":'
"""How the entry of a checkpoint begins behind another one, as `seal` writes it. No text in a JSON holds this."""

_ENTRY_NBYTES = 64 << 10
"""Few entries are as large."""

_Raws = list[msgspec.Raw]


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
    manifest: str  # a sha256, as `_check_manifests` finds out of all entries at once
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
    nbytes, borrows = manifest.nbytes, manifest.borrows  # each is found out anew when asked for
    return Entry(
        step=manifest.step,
        attempt=manifest.attempt,
        manifest=manifest_sha256,
        after=manifest.after,
        created_at=manifest.created_at,
        nbytes=nbytes,
        new_nbytes=manifest.new_nbytes if borrows else nbytes,
        world_size=manifest.world_size,
        components=manifest.shared_components,
        metrics=manifest.metrics,
        tags=tags,
        borrows=borrows,
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
    checkpoints: msgspec.Raw  # type: ignore[assignment]  # not looked into


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
        newest = _last(outline.checkpoints)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{what} breaks the format: {error}") from error
    return _checked(Record(**{**msgspec.structs.asdict(outline), "checkpoints": newest}), number, what)


def _last(entries: msgspec.Raw) -> tuple[Entry, ...]:
    """The last of a JSON list of *entries*, if there is one; those before it are not even taken apart."""
    text = memoryview(entries)
    end = bytes(text[-_ENTRY_NBYTES:])
    at = end.rfind(_BEHIND)
    if at < 0 or bytes(text[:1]) != b"[":  # there is one at most, or a very large one, or another program wrote them
        return tuple(msgspec.json.decode(raw, type=Entry) for raw in msgspec.json.decode(text, type=_Raws)[-1:])
    return (msgspec.json.decode(end[at + 1 : end.rindex(b"]")], type=Entry),)


def _checked(record: Record, number: int, what: str) -> Record:
    _check(record, what)
    if record.number != number:
        raise Torn(f"{what} was written as record {record.number}: was the file renamed?")
    return record


def _check(record: Record, what: str) -> None:
    try:
        check_utc(record.committed_at, record.writer.since)
        _check_entries(record.checkpoints)
    except ValueError as error:  # FormatError is one
        raise FormatError(f"{what} breaks the format: {error}") from error


def _check_entries(entries: Sequence[Entry]) -> None:
    """Rule by rule, each for all entries at once: there may be thousands, most of which say what another one said."""
    _check_steps(entries)
    _check_tags(entries)
    _check_manifests(entries)
    for components in {entry.components for entry in entries}:
        for component in components:
            check_component(component)
    check_utc(*[entry.created_at for entry in entries])
    for metrics in [entry.metrics for entry in entries if entry.metrics]:
        check_metrics(metrics)
    for key in [key for entry in entries for key in entry.borrows]:
        check_data_key(key)


def _check_steps(entries: Sequence[Entry]) -> None:
    steps = [entry.step for entry in entries]
    if len(set(steps)) < len(steps):
        raise FormatError(f"step {Counter(steps).most_common(1)[0][0]} is listed twice")
    if are_attempts_at([entry.attempt for entry in entries], steps):
        return
    for entry in entries:
        if check_attempt(entry.attempt).step != entry.step:
            raise FormatError(f"step {entry.step} is said to lie in {entry.attempt}")


def _check_tags(entries: Sequence[Entry]) -> None:
    given: set[str] = set()
    for entry in [entry for entry in entries if entry.tags]:
        for tag in entry.tags:
            if check_tag(tag) in given:
                raise FormatError(f"a tag of step {entry.step} is given twice")
            given.add(tag)


def _check_manifests(entries: Sequence[Entry]) -> None:
    if are_hex([entry.manifest for entry in entries], 64):
        return
    wrong = next(entry for entry in entries if not are_hex([entry.manifest], 64))
    raise FormatError(f"the manifest of step {wrong.step} has the digest {wrong.manifest[:80]!r}, which is no sha256")
