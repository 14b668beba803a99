"""
Before a save from many ranks: what is equal on all of them, what each has of its own, and who writes what.

1. Every rank captures its state, and tells digests of it: of names and shapes, of values, of what may differ.
2. Rank 0 finds out what differs, names the attempt, and knows whether the plan of the last save still serves.
3. If not, every rank tells what it holds, rank 0 makes a plan, and every rank gets its part.

What is held by several ranks under one name:

    parameters, moments, DTensors    replicas: whoever has least to write writes them. A sample of plain parameters is
                                     compared at every save: models that began equal may drift apart. Where one
                                     differs, all plain parameters and moments are compared as a whole, and those that
                                     differ are stored per rank.
    other tensors of modules         compared by digest at every save; those that differ from rank 0's are stored per
    (buffers)                        rank
    all other components             compared as a whole: values and tensors; stored per rank where they differ

**What a sample sees:** both ends of a parameter, and 64 elements spread over it, others at every save. Training changes
nearly all of a parameter, so drift is seen at once; and so is any that fills a 64th of it. What is shorter, such as one
row of an embedding, is seen sooner or later; until then it is stored as the rank that writes it has it.

**Who is compared with whom:** those that hold one name. A plan puts names that the same ranks hold into one group, and
what only one rank holds into none: the stages of a pipeline have nothing to compare. Without a plan, at the first save
above all, everything is one group; where that differs, all is compared as a whole, once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import msgspec
import numpy as np
import torch

from ckptman.errors import SaveFailed
from ckptman.format.digest import Hasher, sha256
from ckptman.format.names import rank_name
from ckptman.format.ranks import own_name
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.pipeline.ranks import Ranks
from ckptman.plan.save import Held, Share, assign
from ckptman.state.capture import Captured, Leaf
from ckptman.state.tensors import as_bytes, dtype_name, is_row_major, overwrite

_log = logging.getLogger("ckptman")

SAMPLE_NBYTES = 4096
"""How much is compared of the beginning and of the end of what is taken for a replica."""

SPREAD = 64
"""How many elements between them are compared: as many cache misses for each parameter, some microseconds."""

_ALONE = -1
"""The group of what no other rank holds."""

_MIXER = 0x9E3779B1
"""2**32 by the golden ratio (Knuth): its multiples, modulo 2**32, lie evenly, whatever the distance of the steps."""

_TRAINED = ("module", "optimizer")


class _Part(msgspec.Struct, frozen=True, array_like=True):
    """
    Digests of a component: of its values, and by group of those of its tensors that may differ between ranks, and of
    samples of its parameters.
    """

    name: str
    kind: str
    values: str
    contents: dict[int, str]
    parameters: dict[int, str]


class _Opening(msgspec.Struct, frozen=True, array_like=True):
    """What a rank says first: ``signature`` is the digest of what it holds, ``plan`` what its plan was made for."""

    step: int
    signature: str
    plan: str
    parts: list[_Part]


class _Orders(msgspec.Struct, frozen=True, array_like=True):
    """
    What rank 0 answers: where to write, and what may be borrowed from.

    ``plan`` is what the plan of this save is made for; with ``is_new`` it is still to be made.
    """

    attempt: str
    after: int
    attempts: list[str]
    plan: str
    is_new: bool
    have_drifted: bool  # parameters differ between ranks, so that no sample can be trusted


class _Wholes(msgspec.Struct, frozen=True, array_like=True):
    """Of what a rank holds, column by column: the tensors, and digests by which their replicas are told."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    samples: list[str]


class _Details(msgspec.Struct, frozen=True, array_like=True):
    """
    What a rank holds: ``wholes``, encoded, and of each box where it lies and its size.

    The wholes are the same on nearly all ranks, so rank 0 reads them once, and all boxes of a tensor share its name.
    """

    wholes: bytes
    offsets: list[tuple[int, ...]]
    extents: list[tuple[int, ...]]
    nbytes: list[int]


class _RankPlan(msgspec.Struct, frozen=True, array_like=True):
    """
    For one rank: what it writes, which of what it holds is its own alone, and of which components the values are.

    ``groups`` has the group of each leaf, or nothing where all are in group 0. ``serves_again``: nothing differed.
    """

    shares: list[Share]
    own_leaves: list[int]
    own_values: list[str]
    groups: list[int]
    serves_again: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempted:
    """
    What rank 0 knows about an attempt before anything is written.

    Its name, the number of the newest record, and the attempts that may be borrowed from.
    """

    attempt: str
    after: int
    attempts: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """
    A save from many ranks, as one of them sees it before it writes.

    Attributes:
        attempt: Where all write.
        after: Number of the newest record when it was named: the next one lists it, or it will never be listed.
        attempts: What may be borrowed from.
        mine: What this rank writes: file → its leaves.
        own_values: The components whose values this rank has of its own.
    """

    attempt: str
    after: int
    attempts: Sequence[str]
    mine: Mapping[str, Captured]
    own_values: Sequence[str]


class Sharing:
    """Plans saves from many ranks, and keeps the last plan. To be used by one thread at a time."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._plan: _RankPlan | None = None
        self._planned_for = ""
        self._signature = ""  # of what this rank held then

    def begin(
        self, step: int, capture: Callable[[], Mapping[str, Captured]], name_attempt: Callable[[], Attempted]
    ) -> tuple[Mapping[str, Captured], Shared]:
        """
        Capture the state on all ranks and find out who writes what of it. Collective.

        Args:
            step: The same on all ranks.
            capture: Gives the state of this rank; what it raises is raised on all ranks.
            name_attempt: Called on rank 0 once all ranks have captured; what it raises is raised on all ranks.

        Raises:
            SaveFailed: The ranks do not save the same step, or have different components.
        """
        captured: Mapping[str, Captured] = {}
        held: list[Held] = []
        openings: list[_Opening] = []

        def opening() -> bytes:
            nonlocal captured, held
            captured = capture()
            held = [_held(leaf) for leaf in _leaves(captured)]
            signature = sha256(msgspec.msgpack.encode(held))
            if signature != self._signature:
                self._plan, self._planned_for, self._signature = None, "", signature
            groups = iter(self._plan.groups if self._plan is not None and self._plan.groups else [0] * len(held))
            parts = [_part(name, part, [next(groups) for _ in part.leaves], step) for name, part in captured.items()]
            return msgspec.msgpack.encode(_Opening(step, signature, self._planned_for, parts))

        def orders(parts: list[bytes]) -> bytes:
            openings[:] = [msgspec.msgpack.decode(part, type=_Opening) for part in parts]
            _check_agreement(openings)
            plan, named = _fingerprint(openings), name_attempt()
            have_drifted = _differ(openings, lambda part: part.parameters)
            have_changed = have_drifted or _differ(openings, lambda part: part.contents)
            serves = self._plan is not None and self._plan.serves_again and not have_changed
            is_new = not serves or any(opening.plan != plan for opening in openings)
            return msgspec.msgpack.encode(
                _Orders(named.attempt, named.after, list(named.attempts), plan, is_new, have_drifted)
            )

        told = msgspec.msgpack.decode(self._ranks.conclude(opening, orders), type=_Orders)
        if told.is_new:
            self._plan, self._planned_for = None, ""
            answer = self._ranks.conclude(
                lambda: _details(held, _samples(captured, step, whole=told.have_drifted)),
                lambda parts: _planned(openings, parts),
            )
            self._plan = msgspec.msgpack.decode(answer, type=list[_RankPlan])[self._ranks.rank]
            self._planned_for = told.plan
        assert self._plan is not None
        mine = _chosen(captured, self._plan, self._ranks.rank)
        return captured, Shared(
            attempt=told.attempt,
            after=told.after,
            attempts=told.attempts,
            mine=mine,
            own_values=self._plan.own_values,
        )


def _leaves(captured: Mapping[str, Captured]) -> Iterator[Leaf]:
    for part in captured.values():
        yield from part.leaves


def _held(leaf: Leaf) -> Held:
    tensor = leaf.tensor
    extent = tuple(tensor.shape)
    return Held(
        name=leaf.name,
        dtype=dtype_name(tensor.dtype),
        shape=extent if leaf.shape is None else leaf.shape,
        offset=(0,) * len(extent) if leaf.offset is None else leaf.offset,
        extent=extent,
        nbytes=tensor.numel() * tensor.element_size(),
    )


def _may_differ(kind: str, leaf: Leaf) -> bool:
    """Whether *leaf* is compared at every save."""
    return leaf.offset is None and not (kind in _TRAINED and (leaf.is_parameter or kind == "optimizer"))


def _part(name: str, part: Captured, groups: Sequence[int], step: int) -> _Part:
    contents: dict[int, Hasher] = {}
    parameters: dict[int, Hasher] = {}
    for leaf, group in zip(part.leaves, groups, strict=True):
        if group == _ALONE:
            continue
        if _may_differ(part.kind, leaf):
            hasher = contents.setdefault(group, Hasher())
            hasher.update(leaf.name.encode())
            hasher.update(_host_bytes(leaf.tensor))
        elif leaf.is_parameter and leaf.offset is None:
            _add_sample(parameters.setdefault(group, Hasher()), leaf.tensor, step)
    values = hashlib.sha256(part.values).hexdigest()
    return _Part(name, part.kind, values, _digests(contents), _digests(parameters))


def _digests(hashers: Mapping[int, Hasher]) -> dict[int, str]:
    return {group: hasher.hexdigest() for group, hasher in hashers.items()}


def _host_bytes(tensor: torch.Tensor) -> memoryview:
    if tensor.device.type == "cpu" and is_row_major(tensor):
        return as_bytes(tensor)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    overwrite(copy, tensor)
    return as_bytes(copy)


def _samples(captured: Mapping[str, Captured], step: int, *, whole: bool) -> list[str]:
    return [_sample(part.kind, leaf, step, whole=whole) for part in captured.values() for leaf in part.leaves]


def _sample(kind: str, leaf: Leaf, step: int, *, whole: bool) -> str:
    """By what a replica of *leaf* is told; "" where it needs no telling."""
    if leaf.offset is not None or kind not in _TRAINED:
        return ""
    hasher = Hasher()
    if whole or _may_differ(kind, leaf):
        hasher.update(_host_bytes(leaf.tensor))
    else:
        _add_sample(hasher, leaf.tensor, step)
    return hasher.hexdigest()


def _add_sample(hasher: Hasher, tensor: torch.Tensor, step: int) -> None:
    """Add both ends of *tensor*, and elements between them that go by *step*; all of it if that is little more."""
    count = max(1, SAMPLE_NBYTES // tensor.element_size())
    if tensor.numel() <= 2 * count or not is_row_major(tensor):
        hasher.update(_host_bytes(tensor))
        return
    flat = tensor.reshape(-1)
    stride = tensor.numel() // SPREAD
    first = (step * _MIXER % 2**32) * stride >> 32
    if tensor.is_cpu:  # without an operation of torch for each
        elements = np.frombuffer(as_bytes(flat), dtype=f"V{tensor.element_size()}")
        for part in (elements[:count], elements[-count:], elements[first::stride]):
            hasher.update(part.tobytes())
        return
    for chosen in (flat[:count], flat[-count:], flat[first::stride]):
        hasher.update(_host_bytes(chosen))


def _check_agreement(openings: list[_Opening]) -> None:
    steps = {rank: opening.step for rank, opening in enumerate(openings)}
    if len(set(steps.values())) > 1:
        raise SaveFailed(f"the ranks are to save different steps, which is not one checkpoint: {steps}")
    first = [(part.name, part.kind) for part in openings[0].parts]
    for rank, opening in enumerate(openings):
        found = [(part.name, part.kind) for part in opening.parts]
        if found != first:
            raise SaveFailed(f"rank 0 has the components {first}, rank {rank} has {found}: give all ranks the same")


def _own_values(openings: list[_Opening], rank: int) -> list[str]:
    """The components whose values *rank* has of its own."""
    pairs = zip(openings[0].parts, openings[rank].parts, strict=True)
    return [mine.name for first, mine in pairs if mine.values != first.values]


def _own_components(openings: list[_Opening], rank: int) -> list[str]:
    """The components that *rank* has wholly of its own: not trained, and not as rank 0 has them."""
    pairs = zip(openings[0].parts, openings[rank].parts, strict=True)
    return [
        mine.name
        for first, mine in pairs
        if mine.kind not in _TRAINED and (mine.values, mine.contents) != (first.values, first.contents)
    ]


def _fingerprint(openings: list[_Opening]) -> str:
    """What a plan depends on, where nothing that is compared differs."""
    facts = [
        (opening.signature, _own_values(openings, rank), _own_components(openings, rank))
        for rank, opening in enumerate(openings)
    ]
    return sha256(msgspec.msgpack.encode(facts))


def _differ(openings: list[_Opening], digests: Callable[[_Part], dict[int, str]]) -> bool:
    """Whether *digests* of a component that is trained are not the same on all ranks that hold the same."""
    if len({opening.plan for opening in openings}) > 1:
        return True  # their groups are not the same, so that nobody can tell
    known: dict[tuple[str, int], str] = {}
    return any(
        known.setdefault((part.name, group), digest) != digest
        for opening in openings
        for part in opening.parts
        if part.kind in _TRAINED
        for group, digest in digests(part).items()
    )


def _details(held: Sequence[Held], samples: Sequence[str]) -> bytes:
    """What a rank tells of what it holds."""
    wholes = _Wholes(
        [item.name for item in held], [item.dtype for item in held], [item.shape for item in held], list(samples)
    )
    return msgspec.msgpack.encode(
        _Details(
            msgspec.msgpack.encode(wholes),
            [item.offset for item in held],
            [item.extent for item in held],
            [item.nbytes for item in held],
        )
    )


def _told(details: bytes, known: dict[bytes, _Wholes]) -> tuple[_Wholes, list[Held]]:
    """What a rank has told; *known* has the wholes that were met before."""
    told = msgspec.msgpack.decode(details, type=_Details)
    wholes = known.get(told.wholes)
    if wholes is None:
        wholes = known[told.wholes] = msgspec.msgpack.decode(told.wholes, type=_Wholes)
    boxes = told.offsets, told.extents, told.nbytes
    return wholes, list(map(Held, wholes.names, wholes.dtypes, wholes.shapes, *boxes))


@no_search_for_cycles()
def _planned(openings: list[_Opening], parts: list[bytes]) -> bytes:
    """The plan of every rank."""
    known: dict[bytes, _Wholes] = {}
    first: dict[str, tuple[Held, str]] = {}
    held: list[list[Held]] = []
    own_leaves: list[list[int]] = []
    differing: set[str] = set()
    holders: dict[str, list[int]] = {}
    by_rank: list[_Wholes] = []
    for rank, part in enumerate(parts):
        wholes, told = _told(part, known)
        by_rank.append(wholes)
        for name in compress(wholes.names, wholes.samples):
            holders.setdefault(name, []).append(rank)
        own = set(_own_components(openings, rank))
        own_leaves.append([])
        if rank and not own and wholes is by_rank[0]:
            held.append(told)  # exactly as rank 0 has it
            continue
        held.append([])
        for index, (item, sample) in enumerate(zip(told, wholes.samples, strict=True)):
            like, like_sample = first.get(item.name) or first.setdefault(item.name, (item, sample))
            is_like = item.shape == like.shape and item.dtype == like.dtype and sample == like_sample
            if rank and (not is_like or (own and item.name.partition("/")[0] in own)):
                own_leaves[-1].append(index)
                held[-1].append(msgspec.structs.replace(item, name=own_name(item.name, rank)))
                if not is_like:
                    differing.add(item.name)
            else:
                held[-1].append(item)
    if differing:
        _log.info("%d tensors differ between ranks and are stored per rank: %s", len(differing), sorted(differing)[:5])
    groups = _grouped(by_rank, holders)
    plans = [
        _RankPlan(shares, own_leaves[rank], _own_values(openings, rank), groups[rank], not differing)
        for rank, shares in enumerate(assign(held))
    ]
    return msgspec.msgpack.encode(plans)


def _grouped(by_rank: Sequence[_Wholes], holders: Mapping[str, list[int]]) -> list[list[int]]:
    """The group of every leaf of every rank."""
    numbers: dict[tuple[int, ...], int] = {}
    groups = {
        name: numbers.setdefault(tuple(ranks), len(numbers)) if len(ranks) > 1 else _ALONE
        for name, ranks in holders.items()
    }
    if set(groups.values()) <= {0}:
        return [[]] * len(by_rank)
    return [[groups.get(name, 0) for name in wholes.names] for wholes in by_rank]


def _chosen(captured: Mapping[str, Captured], plan: _RankPlan, rank: int) -> dict[str, Captured]:
    """What *rank* writes of *captured*: file → its leaves."""
    everything = [(name, leaf) for name, part in captured.items() for leaf in part.leaves]
    own = set(plan.own_leaves)
    leaves: dict[str, list[Leaf]] = {name: [] for name in captured}
    for share in plan.shares:
        name, leaf = everything[share.index]
        if share.index in own:
            leaf = msgspec.structs.replace(leaf, name=own_name(leaf.name, rank))
        if share.start is not None and share.stop is not None:
            leaf = _rows(leaf, share.start, share.stop)
        leaves[name].append(leaf)
    return {rank_name(name, rank): replace(part, leaves=tuple(leaves[name])) for name, part in captured.items()}


def _rows(leaf: Leaf, start: int, stop: int) -> Leaf:
    whole = tuple(leaf.tensor.shape) if leaf.shape is None else leaf.shape
    offset = (0,) * len(whole) if leaf.offset is None else leaf.offset
    return msgspec.structs.replace(
        leaf, tensor=leaf.tensor[start:stop], offset=(offset[0] + start, *offset[1:]), shape=whole
    )
