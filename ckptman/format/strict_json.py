"""What typed values and safetensors headers need of JSON beyond a parser: no key lost, no odd text, exact bytes."""

from __future__ import annotations

import base64
import json
from typing import NoReturn

from ckptman.errors import FormatError
from ckptman.storage.base import Buffer


def parse(data: Buffer) -> object:
    """
    The JSON in *data*, with objects as *tuples of pairs*: unlike dicts these keep duplicate keys, and JSON has no
    tuples of its own.

    Strings may still hold lone surrogates (`is_plain_text`), floats may be infinite, integers large.

    Raises:
        FormatError: It is not UTF-8, not JSON (NaN is not), or nested too deep for the parser.
    """
    try:
        return json.loads(str(data, "utf-8"), object_pairs_hook=tuple, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid JSON: {error}") from error


def is_plain_text(text: str) -> bool:
    """Whether *text* is valid Unicode: has no lone surrogates, and so an encoding in UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_base64(data: bytes) -> str:
    """*data* in standard base64 with padding."""
    return base64.b64encode(data).decode("ascii")


def from_base64(v: object) -> bytes:
    """The bytes of *v*. Raises FormatError for anything but the one canonical spelling."""
    if type(v) is str:
        try:
            data = base64.b64decode(v, validate=True)
        except ValueError as error:
            raise FormatError(f"{v!r:.80} is not base64: {error}") from error
        if to_base64(data) == v:
            return data
    raise FormatError(f"{v!r:.80} is not base64 as the format spells it")


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")
