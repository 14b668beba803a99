"""
Digests: xxh3-128 of every block of 8 MiB of a chunk (the last block is shorter), sha256 of the small documents.

xxh3-128 detects damage at the speed of memory (30 GB/s on one core here); it is no signature: whoever can write
into a root can forge it. The manifest and the catalog pin each other by sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import xxhash

from ckptman.storage.base import Buffer

ALGORITHM = "xxh3-128"
BLOCK_NBYTES = 8 << 20


Hasher = xxhash.xxh3_128
"""Computes one block's digest piece by piece: ``update``, then ``hexdigest``."""


def blocks(nbytes: int, block_nbytes: int = BLOCK_NBYTES) -> Iterator[tuple[int, int]]:
    """The (start, stop) of every block of *nbytes* bytes; none for 0 bytes."""
    for start in range(0, nbytes, block_nbytes):
        yield start, min(start + block_nbytes, nbytes)


def block_digest(data: Buffer) -> str:
    """xxh3-128 of one block: 32 hex digits. Releases the GIL for large blocks."""
    return xxhash.xxh3_128_hexdigest(data)


def digests(data: Buffer, block_nbytes: int = BLOCK_NBYTES) -> tuple[str, ...]:
    """One digest per block of *data*; empty for no data."""
    view = memoryview(data)
    return tuple(block_digest(view[start:stop]) for start, stop in blocks(len(view), block_nbytes))


def sha256(data: Buffer) -> str:
    """sha256 of a document: 64 hex digits."""
    return hashlib.sha256(data).hexdigest()
