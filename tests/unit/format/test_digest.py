"""Digests: known values, and the boundaries of blocks."""

from __future__ import annotations

import hashlib

import pytest
import xxhash

from ckptman.format.digest import BLOCK_NBYTES, block_digest, blocks, digests, sha256


def test_known_vectors() -> None:
    """The algorithm is xxh3-128 with seed 0, printed as its canonical big-endian bytes; and sha256."""
    assert block_digest(b"") == "99aa06d3014798d86001c324468d497f"  # from the reference implementation of xxHash
    assert block_digest(b"abc") == xxhash.xxh3_128_digest(b"abc", seed=0).hex() == "06b05ab6733a618578af5f94892f3950"
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("nbytes", "count"),
    [(0, 0), (1, 1), (BLOCK_NBYTES - 1, 1), (BLOCK_NBYTES, 1), (BLOCK_NBYTES + 1, 2), (3 * BLOCK_NBYTES, 3)],
)
def test_blocks_cover_everything_once(nbytes: int, count: int) -> None:
    """Blocks follow one another without hole; only the last one is shorter; no bytes, no block."""
    spans = list(blocks(nbytes))
    assert len(spans) == count
    assert [start for start, _ in spans] == [index * BLOCK_NBYTES for index in range(count)]
    assert [stop for _, stop in spans] == [min((index + 1) * BLOCK_NBYTES, nbytes) for index in range(count)]


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK_NBYTES - 1, BLOCK_NBYTES, BLOCK_NBYTES + 1])
def test_digests_are_those_of_the_blocks(nbytes: int) -> None:
    """One digest per block, of bytes, bytearray and memoryview alike."""
    data = (b"0123456789abcdef!" * (nbytes // 17 + 1))[:nbytes]
    expected = tuple(xxhash.xxh3_128_hexdigest(data[at : at + BLOCK_NBYTES]) for at in range(0, nbytes, BLOCK_NBYTES))
    assert digests(data) == digests(bytearray(data)) == digests(memoryview(data)) == expected


def test_other_block_sizes() -> None:
    """The size of a block is the manifest's to say."""
    assert digests(b"abcde", 2) == tuple(map(block_digest, (b"ab", b"cd", b"e")))


def test_a_single_bit_changes_the_digest() -> None:
    """Every flipped bit of a block is seen (4,096 of them)."""
    data = bytearray(hashlib.sha512(b"seed").digest() * 8)
    seen = {block_digest(data)}
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        seen.add(block_digest(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 4096 + 1
