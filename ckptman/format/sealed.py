"""
A sealed document: strict JSON that carries the sha256 of its own body.

    {"sha256":"<64 hex digits>","body":{"format":1,…}}⏎

The digest covers the exact bytes of ``body`` as they stand in the file, so a document can be judged by itself:
a catalog record whose predecessor is gone, a manifest whose catalog is gone.
"""

from __future__ import annotations

import re
from typing import Protocol, TypeVar

import msgspec

from ckptman.errors import FormatError
from ckptman.format.digest import sha256
from ckptman.format.names import FORMAT
from ckptman.storage.base import Buffer


class _Document(Protocol):
    @property
    def format(self) -> int: ...


Document = TypeVar("Document", bound=_Document)

_ENVELOPE = re.compile(rb'\{"sha256":"([0-9a-f]{64})","body":(\{.*\})\}\n', re.DOTALL)

_PRESENT = b'{"format":%d,' % FORMAT
"""How a body of this format begins, as `seal` writes it."""


class Torn(FormatError):
    """The bytes are not what was written: torn, flipped or foreign. (A `FormatError` that may be passed over.)"""


class NewerFormat(FormatError):
    """A newer ckptman wrote it. It is not damaged, and nothing here may mend it."""


class _Versioned(msgspec.Struct):
    format: int


def seal(body: msgspec.Struct) -> bytes:
    """
    *body* as a sealed document.

    Raises:
        FormatError: JSON cannot say it (text that is no valid Unicode, an integer beyond 64 bits).
    """
    try:
        text = msgspec.json.encode(body)
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise FormatError(f"a {type(body).__name__.lower()} cannot be written: {error}") from error
    return b'{"sha256":"%s","body":%s}\n' % (sha256(text).encode(), text)


def unseal(data: Buffer, kind: type[Document], what: str) -> Document:
    """
    The body of a sealed document, checked against its own digest and against the strict type *kind*.

    What of it is left undecoded (`msgspec.Raw`) is a view of *data*, which must not change while that is in use.

    Raises:
        Torn: The bytes differ from what was sealed.
        FormatError: It is whole, but of a newer format, or breaks the rules of its kind.
    """
    envelope = _ENVELOPE.fullmatch(data)
    # a view: `Match.group` would copy megabytes
    body = memoryview(data)[slice(*(envelope.span(2) if envelope else (0, 0)))]
    if envelope is None or sha256(body).encode() != envelope[1]:
        raise Torn(f"{what} is damaged: its bytes do not match the digest that it carries")
    return _decode(body, kind, what)


def _decode(text: memoryview, kind: type[Document], what: str) -> Document:
    try:
        if text[: len(_PRESENT)] != _PRESENT:  # to look for it costs as much as to read the whole
            _check_version(msgspec.json.decode(text, type=_Versioned).format, what)
        document = msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{what} breaks the format: {error}") from error
    _check_version(document.format, what)  # a key that comes twice counts as what it says last
    return document


def _check_version(version: int, what: str) -> None:
    if version > FORMAT:
        raise NewerFormat(f"{what} has format {version}, this ckptman reads up to {FORMAT}: install a newer ckptman")
    if version < 1:
        raise FormatError(f"{what} has format {version}, which never was one")
