"""Sealed documents: whatever happens to their bytes is noticed, and only as our own errors."""

from __future__ import annotations

import msgspec
import pytest

from ckptman.errors import FormatError
from ckptman.format.catalog import Record, read_record
from ckptman.format.digest import sha256
from ckptman.format.manifest import Manifest, read_manifest, write_manifest
from ckptman.format.sealed import NewerFormat, Torn, seal, unseal


class Note(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    text: str = ""


def sealed(body: bytes) -> bytes:
    """A document whose digest is right, whatever *body* is."""
    return b'{"sha256":"%s","body":%s}\n' % (sha256(body).encode(), body)


def every_flip(data: bytes) -> list[bytes]:
    flipped = []
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(changed))
    return flipped


def test_every_flipped_bit_and_truncation_of_a_manifest_is_torn(manifest: Manifest) -> None:
    """No single bit and no cut goes unnoticed, and nothing but `Torn` is raised."""
    data = write_manifest(manifest)
    changes = every_flip(data) + [data[:length] for length in range(len(data))] + [data + b"\n", data + b"\0"]
    torn = 0
    for changed in changes:
        with pytest.raises(Torn, match="is damaged"):
            read_manifest(changed, manifest.attempt)
        torn += 1
    assert torn == 9 * len(data) + 2
    assert torn > 10_000


def test_every_flipped_bit_and_truncation_of_a_record_is_torn(record: Record, record_bytes: bytes) -> None:
    """The same for the catalog, where a torn record may be passed over and so must be told apart."""
    torn = 0
    for changed in every_flip(record_bytes) + [record_bytes[:length] for length in range(len(record_bytes))]:
        with pytest.raises(Torn):
            read_record(changed, record.number)
        torn += 1
    assert torn == 9 * len(record_bytes)
    assert torn > 5_000


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_read(kind: type, record: Record, record_bytes: bytes) -> None:
    """What a storage hands over need not be bytes."""
    assert read_record(kind(record_bytes), record.number) == record


def test_a_newer_format_names_both_versions() -> None:
    """A whole document of a newer format is no damage: the message says what to do, unknown fields and all."""
    newer = sealed(b'{"format":2,"wonder":[1]}')
    with pytest.raises(FormatError, match=r"note has format 2, this ckptman reads up to 1.*newer ckptman") as caught:
        unseal(newer, Note, "note")
    assert not isinstance(caught.value, Torn)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"format":0}',
        b'{"format":-1}',
        b'{"format":1.0}',
        b'{"format":true}',
        b'{"format":null}',
        b'{"format":"1"}',
        b'{"format":1,"more":1}',
        b'{"format":1,"text":3}',
        b'{"format":1,"text":"\xff"}',
        b'{"format":1,"text":"\\ud800"}',
        b'{"format":NaN}',
        b'{"format":1}}',
        b'{"format":1,}',
        b'{"format":' + b"9" * 5000 + b"}",
        b'{"format":1,"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_whole_but_wrong_is_a_format_error(body: bytes) -> None:
    """Sealed nonsense is refused as such: never `Torn`, never another exception, never accepted."""
    with pytest.raises(FormatError) as caught:
        unseal(sealed(body), Note, "note")
    assert not isinstance(caught.value, Torn)
    assert str(caught.value).startswith("note ")


@pytest.mark.parametrize("version", [b"1", b" 1"], ids=["as written", "looked for"])
def test_ten_megabytes_of_brackets_are_refused_at_once(version: bytes) -> None:
    """Nesting costs neither stack nor time."""
    with pytest.raises(FormatError, match=r"recursion|depth|nest|got `array`"):
        unseal(sealed(b'{"format":%s,"text":' % version + b"[" * 10_000_000 + b"}"), Note, "note")


@pytest.mark.parametrize(
    "body", [b'{"format":1,"text":"","format":2}', b'{"text":"","format":2}', b'{"format":2,"new":1}']
)
def test_a_newer_format_is_found_wherever_the_body_says_it(body: bytes) -> None:
    """A body that begins as ours do is not asked first; it may still say something else further on."""
    with pytest.raises(NewerFormat):
        unseal(sealed(body), Note, "note")


def test_what_json_cannot_say_is_not_sealed() -> None:
    """Invalid Unicode is ours to refuse, before anything is written."""
    with pytest.raises(FormatError, match="a note cannot be written"):
        seal(Note(format=1, text="\ud800"))


def test_the_envelope_is_exactly_this() -> None:
    """The normative bytes: the digest covers the body as it stands, and a newline ends the document."""
    assert seal(Note(format=1, text="é")) == sealed('{"format":1,"text":"é"}'.encode())
