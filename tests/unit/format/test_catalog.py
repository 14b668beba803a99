"""Catalog records: each rule broken once, and what an entry takes from a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from ckptman.errors import FormatError
from ckptman.format.catalog import Record, entry_of, read_newest, read_record, write_record
from ckptman.format.digest import sha256
from ckptman.format.manifest import Manifest
from ckptman.format.sealed import Torn

Change = Callable[[Any], object]


def changed(record: Record, change: Change) -> bytes:
    body = json.loads(msgspec.json.encode(record))
    change(body)
    text = json.dumps(body).encode()
    return b'{"sha256":"%s","body":%s}\n' % (sha256(text).encode(), text)


def entry(**fields: object) -> Change:
    return lambda body: body["checkpoints"][0].update(fields)


def twin(**fields: object) -> Change:
    return lambda body: body["checkpoints"].append({**body["checkpoints"][0], **fields})


OTHER = "step-000000000008.w0001.0123abcd"
RULES: list[tuple[str, Change, str]] = [
    ("unknown field", lambda body: body.update(colour=1), "unknown field `colour`"),
    ("unknown field in an entry", entry(colour=1), "unknown field `colour`"),
    ("unknown field in the writer", lambda body: body["writer"].update(colour=1), "unknown field `colour`"),
    ("missing field", lambda body: body.pop("nonce"), "missing required field `nonce`"),
    ("number 0", lambda body: body.update(number=0), ">= 1"),
    ("number of 13 digits", lambda body: body.update(number=10**12), "<= 999999999999"),
    ("epoch 0", lambda body: body["writer"].update(epoch=0), ">= 1"),
    ("previous", lambda body: body.update(previous="0" * 63), "matching regex"),
    ("commit's time zone", lambda body: body.update(committed_at="2026-01-02T03:04:05+02:00"), "not in UTC"),
    ("writer's time zone", lambda body: body["writer"].update(since="2026-01-02T03:04:05+02:00"), "not in UTC"),
    ("entry's time zone", entry(created_at="2026-01-02T03:04:05+02:00"), "not in UTC"),
    ("manifest's digest", entry(manifest="0" * 32), "which is no sha256"),
    ("manifest's digest in capitals", entry(manifest="A" * 64), "which is no sha256"),
    ("another step", entry(step=8), "step 8 is said to lie in step-000000000007"),
    ("no attempt", entry(attempt="step-7"), "not the name of an attempt"),
    ("attempt with a path", entry(attempt="../step-000000000007.w0001.0123abcd"), "not the name of an attempt"),
    ("step twice", twin(tags=[]), "step 7 is listed twice"),
    ("tag twice", twin(step=8, attempt=OTHER), "a tag of step 8 is given twice"),
    ("tag twice in one", entry(tags=["a", "a"]), "a tag of step 7 is given twice"),
    ("tag latest", entry(tags=["latest"]), "cannot be a tag"),
    ("tag number", entry(tags=["7"]), "cannot be a tag"),
    ("component", entry(components=["a/b"]), "cannot name a component"),
    ("metric name", entry(metrics={"": 1.0}), "cannot name a metric"),
    ("metric count", entry(metrics={f"m{index}": 1.0 for index in range(1001)}), "at most 1000"),
    ("borrowed path", entry(borrows=["../x.safetensors"]), "not a valid key"),
    ("borrowed manifest", entry(borrows=[f"{OTHER}/manifest.json"]), "not a data file"),
    ("borrowed nothing", entry(borrows=["writer.lock"]), "not the name of an attempt"),
    ("negative size", entry(nbytes=-1), ">= 0"),
]


@pytest.mark.parametrize(("change", "message"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_a_broken_rule_is_a_telling_format_error(record: Record, change: Change, message: str) -> None:
    """A whole record that breaks a rule is no torn one: it must not be passed over in silence."""
    with pytest.raises(FormatError) as caught:
        read_record(changed(record, change), record.number)
    assert not isinstance(caught.value, Torn)
    assert str(caught.value).startswith("catalog record 4 breaks the format: ")
    assert message in str(caught.value)


def test_the_rules_are_all_there() -> None:
    """So that a table that shrinks fails."""
    assert len(RULES) >= 28


def test_it_comes_back_equal(record: Record, record_bytes: bytes) -> None:
    """read(write(x)) == x, and the same bytes again."""
    assert read_record(record_bytes, 4) == record
    assert write_record(read_record(record_bytes, 4)) == record_bytes


def test_another_spelling_of_the_same_json_is_read(record: Record) -> None:
    """Other programs may write spaces and escapes: the digest covers the bytes, the rules the meaning."""
    assert read_record(changed(record, lambda body: None), 4) == record


def test_a_renamed_record_is_refused(record_bytes: bytes) -> None:
    """A record speaks for its own number only: under another one these bytes were never written."""
    with pytest.raises(Torn, match="was written as record 4"):
        read_record(record_bytes, 5)


@pytest.mark.parametrize("change", [{"number": 0}, {"previous": "x"}, {"change": "\ud800"}, {"number": 2**70}])
def test_what_cannot_be_read_is_never_written(record: Record, change: dict[str, Any]) -> None:
    """The writer holds itself to the reader's rules."""
    with pytest.raises(FormatError):
        write_record(msgspec.structs.replace(record, **change))


def test_an_empty_root_has_a_record_too(record: Record) -> None:
    """The first record of a root lists nothing and follows nothing."""
    first = msgspec.structs.replace(record, number=1, previous=None, checkpoints=())
    assert read_record(write_record(first), 1) == first


def test_an_entry_says_what_its_manifest_says(manifest: Manifest) -> None:
    """Listing needs no manifest: everything that is listed is copied, in the order of the components."""
    listed = entry_of(manifest, "a" * 64, tags=("t",))
    same = ["step", "attempt", "after", "created_at", "nbytes", "new_nbytes", "world_size", "metrics", "preempted"]
    assert [getattr(listed, name) for name in same] == [getattr(manifest, name) for name in same]
    assert (listed.components, listed.tags, listed.borrows) == (("model", "epoch"), ("t",), manifest.borrows)
    assert listed.manifest == "a" * 64


def test_the_newest_is_read_as_strictly_as_all_are(record: Record) -> None:
    """Of a record, `read_newest` gives what `read_record` gives, without the older entries; with none, none."""
    older = msgspec.structs.replace(record.checkpoints[0], step=8, attempt=OTHER, tags=())
    both = msgspec.structs.replace(record, checkpoints=(older, *record.checkpoints))
    assert read_newest(write_record(both), record.number) == record
    empty = msgspec.structs.replace(record, checkpoints=())
    assert read_newest(write_record(empty), record.number) == empty


def test_the_newest_is_found_however_it_is_written(record: Record) -> None:
    """What looks like the beginning of an entry within a name, other spacing, and an entry of any size."""
    newest = record.checkpoints[0]
    odd = {',{"step":8,"attempt":"x"}': 1.0, "],": 2.0}
    large = {f"metric {number:0190d}": 1.0 for number in range(900)}
    for metrics in (odd, large):
        older = msgspec.structs.replace(newest, step=8, attempt=OTHER, tags=(), metrics=metrics)
        latest = msgspec.structs.replace(newest, metrics=metrics)
        both = msgspec.structs.replace(record, checkpoints=(older, latest))
        for data in (write_record(both), changed(both, lambda body: None)):
            assert read_newest(data, record.number).checkpoints == (latest,)


def test_a_list_of_something_else_has_no_newest(record: Record) -> None:
    """Nor has anything that ends like a list of entries."""
    one = json.loads(msgspec.json.encode(record.checkpoints[0]))
    for checkpoints in ("a list", None, {"x": [{}, one]}, [[]], [[{}, one]], [{"x": [{}, one]}], [{}, {"x": one}]):
        body = {**json.loads(msgspec.json.encode(record)), "checkpoints": checkpoints}
        text = json.dumps(body, separators=(",", ":")).encode()
        data = b'{"sha256":"%s","body":%s}\n' % (sha256(text).encode(), text)
        with pytest.raises(FormatError, match="breaks the format"):
            read_newest(data, record.number)


def test_attempts_are_looked_at_one_by_one(record: Record) -> None:
    """Though they are checked all at once: none makes up for another one, wherever their texts are cut."""
    first = record.checkpoints[0]
    for texts in [
        (f"{first.attempt}\n{OTHER}", ""),
        ("", f"{first.attempt}\n{OTHER}"),
        (f"{first.attempt}\nstep-", OTHER.removeprefix("step-")),
        (first.attempt, f"{OTHER}\n"),
        (OTHER, first.attempt),
        (first.attempt, OTHER.upper()),
    ]:
        both = [msgspec.structs.replace(first, step=7 + n, attempt=text, tags=()) for n, text in enumerate(texts)]
        with pytest.raises(FormatError, match=r"is said to lie in|not the name of an attempt"):
            write_record(msgspec.structs.replace(record, checkpoints=tuple(both)))


def test_digests_are_looked_at_one_by_one(record: Record) -> None:
    """A digit that one manifest's digest lacks and another one's has too many is missed in both."""
    first = record.checkpoints[0]
    second = msgspec.structs.replace(first, step=8, attempt=OTHER, tags=(), manifest="a" * 65)
    both = (msgspec.structs.replace(first, manifest="a" * 63), second)
    with pytest.raises(FormatError, match="the manifest of step 7"):
        write_record(msgspec.structs.replace(record, checkpoints=both))


@pytest.mark.parametrize(("change", "match"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_every_rule_holds_for_the_newest(record: Record, change: Change, match: str) -> None:
    """A rule that the newest entry breaks by itself, or the record, is found; what older ones break is not."""
    data = changed(record, change)
    if "twice" in match and "in one" not in match and change.__qualname__.startswith("twin"):
        assert len(read_newest(data, record.number).checkpoints) == 1  # its twin is older
    else:
        with pytest.raises(FormatError, match=match):
            read_newest(data, record.number)
