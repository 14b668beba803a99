"""The types of fields that several documents have."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated

import msgspec

from ckptman.format.names import MAX_STEP

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
Utc = Annotated[datetime, msgspec.Meta(tz=True)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]

_HEX = re.compile("[0-9a-f]*")


def are_hex(texts: Collection[str], digits: int) -> bool:
    """Whether each of *texts* is so many hex digits. Of very many, this takes half as long as a pattern of each."""
    return {*map(len, texts)} <= {digits} and _HEX.fullmatch("".join(texts)) is not None


def check_utc(*times: datetime) -> None:
    """Raise ValueError unless all *times* are in UTC."""
    for time in times:
        if time.tzinfo is not UTC and time.utcoffset():  # the first: asked of every checkpoint of a catalog
            raise ValueError(f"the time {time.isoformat()} is not in UTC")
