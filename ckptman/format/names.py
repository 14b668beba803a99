"""Every name, key and pattern of a root, in one place. What comes from a user or a file is checked here."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ckptman.errors import FormatError
from ckptman.storage.base import RESERVED, check_key

FORMAT = 1
"""The version of the format that this code writes, and the newest that it reads."""

MARKER = "ckptman.json"
CATALOG = "catalog"
MANIFEST = "manifest.json"

MAX_STEP = 2**63 - 1
MAX_METRICS = 1000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RANK_SUFFIX = re.compile(r"(.*)\.rank-([0-9]+)")
_NOT_A_COMPONENT = (RESERVED, _RANK_SUFFIX)
_RECORD = re.compile(r"catalog/([0-9]{12})\.json")
_ATTEMPT = re.compile(r"step-([0-9]{12}|[1-9][0-9]{12,18})\.w([0-9]{4}|[1-9][0-9]{4,17})\.([0-9a-f]{8})")
_ATTEMPT_LINE = re.compile(r"step-([0-9]{12}|[1-9][0-9]{12,18})\.w(?:[0-9]{4}|[1-9][0-9]{4,17})\.[0-9a-f]{8}\n")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@functools.lru_cache(4096)  # the same few names come again with every checkpoint of a catalog
def check_component(name: str) -> str:
    """
    Return *name* if it can name a component, and so a file on every operating system.

    Raises:
        ValueError: It breaks ``[A-Za-z0-9][A-Za-z0-9._-]{0,63}``, is a device name on Windows, or ends like a
            rank's file (``.rank-1``).
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or any(p.fullmatch(name) for p in _NOT_A_COMPONENT):
        raise ValueError(
            f"{name!r} cannot name a component: use 1 to 64 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit (and no device name such as 'nul', no '.rank-1' at the end)"
        )
    return name


def rank_name(component: str, rank: int) -> str:
    """What rank *rank* calls its own part of *component*: ``model.rank-00001``; rank 0 calls it as it is."""
    return component if rank == 0 else f"{component}.rank-{rank:05d}"


@functools.lru_cache(65536)
def split_rank(name: str) -> tuple[str, int]:
    """
    The component and the rank of *name*, which `rank_name` made; rank 0 for a plain name.

    Raises:
        ValueError: It is no such name.
    """
    match = _RANK_SUFFIX.fullmatch(name)
    if match is None:
        return check_component(name), 0
    component, rank = check_component(match[1]), int(match[2])
    if rank == 0 or rank_name(component, rank) != name:
        raise ValueError(f"{name!r} does not name what a rank has of its own (as {rank_name(component, 1)!r} does)")
    return component, rank


@functools.lru_cache(4096)
def check_tag(name: str) -> str:
    """
    Return *name* if it can be a tag.

    Raises:
        ValueError: It breaks the pattern of names, or could be taken for a step or for ``latest``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.isdigit() or name == "latest":
        raise ValueError(
            f"{name!r} cannot be a tag: use 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or "
            "digit, and neither 'latest' nor a bare number"
        )
    return name


def check_step(step: int) -> int:
    """
    Return *step* if it is a number of completed steps.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is negative, or 2**63 or more.
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an int, got {type(step).__name__}")
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step must be between 0 and 2**63 - 1, got {step}")
    return step


@functools.lru_cache(4096)
def check_metric(name: str) -> str:
    """Return *name* if it can name a metric: 1 to 200 characters, no control characters. Raises ValueError."""
    if not isinstance(name, str) or not 1 <= len(name) <= 200 or _CONTROL.search(name):
        raise ValueError(f"{name!r} cannot name a metric: use 1 to 200 characters without control characters")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The name of one try at saving *step*, by the writer of *epoch*. Never used twice, thanks to *nonce*."""

    step: int
    epoch: int
    nonce: str

    def __str__(self) -> str:
        return f"step-{self.step:012d}.w{self.epoch:04d}.{self.nonce}"

    @classmethod
    def parse(cls, text: str) -> Attempt | None:
        """The attempt that a folder's name stands for; None if it is not exactly one."""
        match = _ATTEMPT.fullmatch(text)
        if match is None or (step := int(match[1])) > MAX_STEP:
            return None
        return cls(step=step, epoch=int(match[2]), nonce=match[3])


def check_attempt(text: str) -> Attempt:
    """The attempt that *text* names. Raises FormatError."""
    attempt = Attempt.parse(text)
    if attempt is None:
        raise FormatError(f"{text[:80]!r} is not the name of an attempt (step-<12 digits>.w<epoch>.<8 hex digits>)")
    return attempt


def are_attempts_at(texts: Iterable[str], steps: list[int]) -> bool:
    """Whether each of *texts* names an attempt at its one of *steps*. Of a catalog's thousands, found out in one go."""
    parts = _ATTEMPT_LINE.split("".join([f"{text}\n" for text in texts]))
    between, said = parts[::2], parts[1::2]  # a text of several lines would make one attempt too many
    return not any(between) and list(map(int, said)) == steps and max(steps, default=0) <= MAX_STEP


def manifest_key(attempt: str) -> str:
    """Where the manifest of *attempt* lies."""
    return f"{attempt}/{MANIFEST}"


def data_key(attempt: str, component: str) -> str:
    """Where the tensors of *component* lie in *attempt*."""
    return check_key(f"{attempt}/{component}.safetensors")


def check_data_key(key: str) -> str:
    """Return *key* if it is that of a data file of an attempt. Raises FormatError."""
    folder, _, name = check_key(key).partition("/")
    check_attempt(folder)
    if "/" in name or not name.endswith(".safetensors"):
        raise FormatError(f"{key[:80]!r} is not a data file of an attempt")
    return key


def record_key(number: int) -> str:
    """Where the catalog record with *number* lies."""
    return f"{CATALOG}/{number:012d}.json"


def record_number(key: str) -> int | None:
    """The number of the record that lies at *key*; None if none can (numbers begin with 1)."""
    match = _RECORD.fullmatch(key)
    return int(match[1]) or None if match else None
