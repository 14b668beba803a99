"""Who writes what: everything once, evenly, the same on every rank, and quickly."""

from __future__ import annotations

import math
import time

from hypothesis import given
from hypothesis import strategies as st

from ckptman.plan.save import SMALLEST_CUT_NBYTES, Held, assign

MIB = 1 << 20


def held(name: str, rows: int, start: int = 0, extent: int | None = None, *, row_nbytes: int = 4) -> Held:
    size = rows if extent is None else extent
    return Held(name, "uint8", (rows, row_nbytes), (start, 0), (size, row_nbytes), size * row_nbytes)


def written(items: list[list[Held]]) -> list[list[tuple[str, int, int]]]:
    """(name, first row, end) of what each rank writes."""
    return [
        [
            (
                items[rank][share.index].name,
                items[rank][share.index].offset[0] + (share.start or 0),
                items[rank][share.index].offset[0]
                + (items[rank][share.index].extent[0] if share.stop is None else share.stop),
            )
            for share in shares
        ]
        for rank, shares in enumerate(assign(items))
    ]


@given(st.data())
def test_every_row_is_written_once_by_one_that_holds_it(data: st.DataObject) -> None:
    """Sharded over any number of ranks, replicated over others, empty on some: nothing twice, nothing left out."""
    shard, replicate = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    items: list[list[Held]] = [[] for _ in range(shard * replicate)]
    sizes = {f"t{i}": data.draw(st.integers(1, 9)) for i in range(data.draw(st.integers(1, 6)))}
    for name, rows in sizes.items():
        each = -(-rows // shard)
        for rank, mine in enumerate(items):
            start = min(rows, rank % shard * each)
            mine.append(held(name, rows, start, min(each, rows - start)))
    seen: dict[str, list[int]] = {name: [] for name in sizes}
    for one in written(items):
        for name, start, stop in one:
            seen[name] += range(start, stop)
    assert {name: sorted(rows) for name, rows in seen.items()} == {n: list(range(r)) for n, r in sizes.items()}
    assert assign(items) == assign(items)


def test_an_empty_tensor_is_written_too() -> None:
    assert written([[held("none", 0)], [held("none", 0)]]) == [[("none", 0, 0)], []]


def test_replicas_are_spread_by_bytes() -> None:
    """Also around what a rank must write anyway."""
    items = [[held(f"t{i}", 100 + i) for i in range(40)] for _ in range(4)]
    items[0].append(held("only here", 500))
    loads = [sum(stop - start for _, start, stop in one) for one in written(items)]
    assert max(loads) - min(loads) < 150


def test_a_replica_beyond_a_fair_share_is_cut() -> None:
    large = held("embedding", 1000, row_nbytes=8 * SMALLEST_CUT_NBYTES // 1000)
    items = [[large, *(held(f"t{i}", 1000) for i in range(8))] for _ in range(4)]
    loads = [sum(stop - start for name, start, stop in one if name == "embedding") for one in written(items)]
    assert sum(loads) == 1000
    assert max(loads) < 300


def test_a_small_replica_is_never_cut() -> None:
    shares = assign([[held("w", 1000)] for _ in range(4)])
    assert [len(one) for one in shares] == [1, 0, 0, 0]


def _fsdp(tensors: int, ranks: int) -> list[list[Held]]:
    return [
        [
            Held(f"model/layers.{i}.weight", "float32", (ranks * 8, 64), (rank * 8, 0), (8, 64), 8 * 64 * 4)
            for i in range(tensors)
        ]
        for rank in range(ranks)
    ]


def _seconds(items: list[list[Held]]) -> float:
    best = math.inf
    for _ in range(2):
        began = time.process_time()
        assign(items)
        best = min(best, time.process_time() - began)
    return best


def test_planning_five_thousand_tensors_on_64_ranks_takes_no_second() -> None:
    """CPU time; it grows with the number of boxes, not with its square. (Bounds with room for a busy machine.)"""
    quarter, whole = _seconds(_fsdp(1250, 64)), _seconds(_fsdp(5000, 64))
    replicated = _seconds([[held(f"t{i}", 8) for i in range(5000)] for _ in range(64)])
    assert whole < 2, f"{whole:.2f} s"
    assert replicated < 2, f"{replicated:.2f} s"
    assert whole < 10 * quarter + 0.2
    print(f"planning 5,000 tensors x 64 ranks: sharded {whole:.2f} s, replicated {replicated:.2f} s")
