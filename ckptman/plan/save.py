"""
Who writes what: the leaves that all ranks hold → what each of them writes.

Every box of every tensor is written once, by one of the ranks that hold it. What only one rank holds it writes itself;
replicas go to whoever has least to write, large ones first. A replica that is larger than a fair share is cut along its
first dimension. Deterministic: every rank would find the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

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


class _Holder(NamedTuple):
    rank: int
    item: int


def assign(held: Sequence[Sequence[Held]]) -> list[list[Share]]:
    """
    Who writes what.

    Args:
        held: What each rank holds, by rank. Boxes of one tensor are equal or do not overlap; equal ones hold the same.

    Returns:
        What each rank writes, by rank, in the order in which it holds it. Empty boxes of tensors that are not empty are
        written by nobody.
    """
    holders: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[_Holder]] = {}
    for rank, items in enumerate(held):
        for index, item in enumerate(items):
            if item.nbytes or not math.prod(item.shape):
                holders.setdefault((item.name, item.offset, item.extent), []).append(_Holder(rank, index))
    shares: list[list[Share]] = [[] for _ in held]
    loads = [0] * len(held)
    replicas: list[tuple[int, list[_Holder]]] = []
    for owners in holders.values():
        rank, index = owners[0].rank, owners[0].item
        nbytes = held[rank][index].nbytes
        if len(owners) == 1:
            loads[rank] += nbytes
            shares[rank].append(Share(index))
        else:
            replicas.append((nbytes, owners))
    replicas.sort(key=lambda replica: -replica[0])
    fair = (sum(loads) + sum(nbytes for nbytes, _ in replicas)) // max(1, len(held))
    for nbytes, owners in replicas:
        item = held[owners[0].rank][owners[0].item]
        for start, stop in _cuts(item, len(owners), fair):
            owner = min(owners, key=lambda holder: (loads[holder.rank], holder.rank))
            loads[owner.rank] += nbytes if start is None or stop is None else nbytes * (stop - start) // item.extent[0]
            shares[owner.rank].append(Share(owner.item, start, stop))
    for one in shares:
        one.sort(key=lambda share: (share.index, share.start or 0))
    return shares


def _cuts(item: Held, holders: int, fair: int) -> list[tuple[int | None, int | None]]:
    if item.nbytes < SMALLEST_CUT_NBYTES or item.nbytes <= fair or item.extent[0] < 2:
        return [(None, None)]
    pieces = min(holders, item.extent[0], -(-item.nbytes // max(fair, SMALLEST_CUT_NBYTES // 2)))
    edges = [item.extent[0] * number // pieces for number in range(pieces + 1)]
    return list(pairwise(edges))
