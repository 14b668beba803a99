"""
Who writes what: the leaves that all ranks hold → what each of them writes.

Every box of every tensor is written once, by one of the ranks that hold it. What only one rank holds it writes itself;
replicas go to whoever has least to write, large ones first. A replica that is larger than a fair share is cut along its
first dimension. Deterministic: every rank would find the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, repeat
from operator import attrgetter

import msgspec

SMALLEST_CUT_NBYTES = 16 << 20
"""Replicas below this size are never cut: a tensor in one piece is easier to read for other tools."""


class Held(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A box of a tensor that a rank holds. ``shape`` is the tensor's, ``extent`` the box's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    nbytes: int


class Share(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Number ``index`` of what a rank holds, or rows ``start`` to ``stop`` of it where it was cut (else both None)."""

    index: int
    start: int | None = None
    stop: int | None = None


_Holder = tuple[int, int]  # a rank, and the number of the box among those that it holds
_Box = tuple[tuple[int, ...], tuple[int, ...]]


def assign(held: Sequence[Sequence[Held]]) -> list[list[Share]]:
    """
    Who writes what.

    Args:
        held: What each rank holds, by rank. Boxes of one tensor are equal or do not overlap; equal ones hold the same.

    Returns:
        What each rank writes, by rank, in the order in which it holds it. Empty boxes of tensors that are not empty are
        written by nobody.
    """
    shares: list[list[Share]] = [[] for _ in held]
    loads = [0] * len(held)
    replicas: list[list[_Holder]] = []
    for holders in _by_name(held):
        share = Share(holders[0][1])
        first: dict[_Box, _Holder] = {}
        shared: dict[_Box, list[_Holder]] = {}
        for holder in holders:
            item = held[holder[0]][holder[1]]
            if item.nbytes or not math.prod(item.shape):
                box = item.offset, item.extent
                known = first.setdefault(box, holder)
                if known is not holder:
                    shared.setdefault(box, [known]).append(holder)
        for box, (rank, index) in first.items():
            if box not in shared:
                loads[rank] += held[rank][index].nbytes
                shares[rank].append(share if share.index == index else Share(index))
        replicas += shared.values()
    _spread(held, replicas, loads, shares)
    for one in shares:
        one.sort(key=attrgetter("index"))  # the pieces of one that was cut are in their order
    return shares


def _by_name(held: Sequence[Sequence[Held]]) -> Iterator[list[_Holder]]:
    """Who holds something of a tensor, for each: one at a time, since all together are many times as many objects."""
    names = [[item.name for item in items] for items in held]
    if names and len(set(names[0])) == len(names[0]) and all(map(names[0].__eq__, names)):  # as it nearly always is
        ranks = range(len(held))
        yield from (list(zip(ranks, repeat(index))) for index in range(len(names[0])))
        return
    found: dict[str, list[_Holder]] = {}
    for rank, some in enumerate(names):
        for index, name in enumerate(some):
            found.setdefault(name, []).append((rank, index))
    yield from found.values()


def _spread(
    held: Sequence[Sequence[Held]], replicas: list[list[_Holder]], loads: list[int], shares: list[list[Share]]
) -> None:
    """Give each of *replicas* to the holder that has least to write, the largest first."""
    sized = [(held[rank][index], owners) for owners in replicas for rank, index in owners[:1]]
    sized.sort(key=lambda replica: -replica[0].nbytes)
    fair = (sum(loads) + sum(item.nbytes for item, _ in sized)) // max(1, len(held))
    for item, owners in sized:
        for start, stop in _cuts(item, len(owners), fair):
            rank, index = min(owners, key=lambda holder: loads[holder[0]])  # of equals the lowest
            part = 1 if start is None or stop is None else (stop - start) / item.extent[0]
            loads[rank] += round(item.nbytes * part)
            shares[rank].append(Share(index, start, stop))


def _cuts(item: Held, holders: int, fair: int) -> list[tuple[int | None, int | None]]:
    if item.nbytes < SMALLEST_CUT_NBYTES or item.nbytes <= fair or item.extent[0] < 2:
        return [(None, None)]
    pieces = min(holders, item.extent[0], -(-item.nbytes // max(fair, SMALLEST_CUT_NBYTES // 2)))
    edges = [item.extent[0] * number // pieces for number in range(pieces + 1)]
    return list(pairwise(edges))
