"""
Which checkpoint is restored: rank 0 resolves it; if any finds damage, all walk back to the same other one.

Rank 0 reads the catalog and the manifest and tells both, so these are read once, however many ranks there are. A
process alone is the job of one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from ckptman.errors import CheckpointNotFound, IntegrityError
from ckptman.format.catalog import Entry
from ckptman.format.manifest import Manifest, read_manifest
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.pipeline.ranks import Ranks
from ckptman.repository.both import Placed
from ckptman.repository.repository import Repository, Which, all_damaged
from ckptman.repository.roots import Roots
from ckptman.types import Checkpoint, Skipped


class _Damage(msgspec.Struct, frozen=True, array_like=True):
    """Why a checkpoint was passed over; ``key`` is that of `Placed`."""

    key: tuple[str, bool]
    step: int
    reason: str


class _Chosen(msgspec.Struct, frozen=True):
    """
    What to restore next (None: there is nothing), where it is, and all that was passed over so far.

    ``ranks_of_host`` says for each rank how many there are on its host.
    """

    entry: Entry | None
    is_mirrored: bool
    manifest: bytes
    passed_over: list[_Damage]
    ranks_of_host: list[int]


Load = Callable[[Repository, Entry, Manifest, int], Checkpoint]
"""
Loads a checkpoint on all ranks, or raises the same on all; IntegrityError where one of them found damage.

The number is that of the ranks on this host.
"""


def recall(
    ranks: Ranks, roots: Roots, which: Which, *, load: Load, pass_over: Callable[[int, str], Skipped]
) -> tuple[Checkpoint | None, tuple[Skipped, ...]]:
    """
    Load the checkpoint that *which* means on all ranks. Collective.

    Args:
        ranks: All of them.
        roots: Where checkpoints are; looked at by rank 0.
        which: As `CheckpointManager.restore` takes it.
        load: Called on all ranks.
        pass_over: Called on all ranks with the step and the reason for each checkpoint that is passed over.

    Returns:
        What was loaded (None: the latest was asked for, and there is none), and what was passed over.

    Raises:
        CkptmanError: As `CheckpointManager.restore` says; the same on every rank.
        RankLost: A rank went away.
    """
    passed_over: list[_Damage] = []
    damaged: tuple[Placed, IntegrityError] | None = None
    while True:
        chosen = _choose(ranks, roots, which, passed_over, damaged)
        for damage in chosen.passed_over[len(passed_over) :]:
            pass_over(damage.step, damage.reason)
        passed_over = chosen.passed_over
        skipped = tuple(Skipped(step=damage.step, reason=damage.reason) for damage in passed_over)
        if chosen.entry is None:
            return None, skipped
        placed = Placed(chosen.entry, chosen.is_mirrored)
        try:
            with no_search_for_cycles():
                manifest = read_manifest(chosen.manifest, chosen.entry.attempt)
            return load(roots.of(placed), chosen.entry, manifest, chosen.ranks_of_host[ranks.rank]), skipped
        except IntegrityError as error:
            damaged = placed, error


def _choose(
    ranks: Ranks,
    roots: Roots,
    which: Which,
    passed_over: list[_Damage],
    damaged: tuple[Placed, IntegrityError] | None,
) -> _Chosen:
    def choose(hosts: list[bytes]) -> bytes:
        over, fault, counts = list(passed_over), damaged, Counter(hosts)
        ranks_of_host = [counts[host] for host in hosts]
        while True:
            if fault is not None:
                _judge(*fault, roots, which, over)
            placed = roots.choose(which, {damage.key for damage in over})
            if placed is None:
                if over and fault is not None and which != "latest":
                    raise fault[1]
                if over:
                    raise all_damaged([(one.step, one.reason) for one in over], roots.root.storage.url)
                return msgspec.msgpack.encode(_Chosen(None, False, b"", over, ranks_of_host))
            try:
                data = roots.of(placed).manifest_data(placed.entry)
            except IntegrityError as error:
                fault = placed, error
            else:
                chosen = _Chosen(placed.entry, placed.is_mirrored, data, over, ranks_of_host)
                return msgspec.msgpack.encode(chosen)

    return msgspec.msgpack.decode(ranks.conclude(ranks.host.encode, choose), type=_Chosen)


def _judge(placed: Placed, error: IntegrityError, roots: Roots, which: Which, over: list[_Damage]) -> None:
    """Note that *placed* is damaged. One that was dropped while it was read is not, and newer ones may exist."""
    if roots.lists(placed):
        over.append(_Damage(placed.key, placed.entry.step, str(error)))
    elif which != "latest":
        url = roots.of(placed).storage.url
        raise CheckpointNotFound(f"step {placed.entry.step} of {url} was deleted while it was read") from error
