"""Ranks of a process group that talk through its store: what they exchange, and what they learn of each other's end."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from fleet import run

from ckptman import coordinator
from ckptman.coordinator import Coordinator, RankLost, Solo, TorchCoordinator, current

SILENCE_S = 3.0


def _exchange(rank: int) -> dict[str, Any]:
    with TorchCoordinator() as ranks:
        assert isinstance(ranks, Coordinator)
        draw = random.Random(rank)
        values = [draw.randbytes(n) for n in (0, 1, 5 + rank, 9_000_000)]
        found: dict[str, Any] = {"who": [ranks.rank, ranks.world_size, ranks.host]}
        found["gathered"] = [
            None if (got := ranks.gather(value)) is None else [len(v) for v in got] for value in values
        ]
        found["broadcast"] = [ranks.broadcast(value if rank == 0 else None)[:9].hex() for value in values]
        found["agreed"] = [ranks.agree(bytes([rank, i])).__repr__() for i in range(3)]
        other = ranks.channel("other")
        found["other"] = [v.decode() for v in other.agree(b"%d" % rank)]
        board = ranks._board
        found["left over"] = any(board.has(f"main.0.{n}.{r}") for n in range(4) for r in range(1, 3))
        dist.barrier()
    return found


def test_what_ranks_exchange_arrives_by_rank_whatever_its_size(tmp_path: Path) -> None:
    """From nothing to more than a store takes at once; on every rank the same; what was read is taken down."""
    found = run(tmp_path, 3, _exchange)
    assert [one["who"] for one in found] == [[rank, 3, socket.gethostname()] for rank in range(3)]
    assert found[0]["gathered"] == [[0] * 3, [1] * 3, [5, 6, 7], [9_000_000] * 3]
    assert found[1]["gathered"] == found[2]["gathered"] == [None] * 4
    assert found[0]["broadcast"] == found[1]["broadcast"] == found[2]["broadcast"]
    assert found[0]["agreed"] == found[2]["agreed"] == [repr([bytes([r, i]) for r in range(3)]) for i in range(3)]
    assert [one["other"] for one in found] == [["0", "1", "2"]] * 3
    assert not any(one["left over"] for one in found)


def _lose(rank: int, victim: int, method: str, end: str) -> dict[str, Any]:
    with TorchCoordinator(silence_s=SILENCE_S) as ranks:
        ranks.agree(b"all here")
        if rank == victim:
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "close":
                ranks.close()
                time.sleep(2.5)  # alive, so that its silence tells nothing
                return {}
            raise AssertionError(end)
        began = time.monotonic()
        found: dict[str, Any] = {}
        try:
            if method == "gather":
                ranks.gather(b"mine")
            if method == "broadcast":
                ranks.broadcast(b"told" if rank == 0 else None)
            ranks.agree(b"mine")
        except RankLost as error:
            found = {"text": str(error), "ranks": error.ranks, "hosts": error.hosts}
        found["s"] = time.monotonic() - began
        try:
            ranks.agree(b"again")
        except RankLost as error:
            found["again"] = error.ranks
        found["again_s"] = time.monotonic() - began - found["s"]
    return found


@pytest.mark.parametrize(("victim", "method"), [(0, "broadcast"), (2, "gather"), (2, "agree")])
def test_a_killed_rank_is_named_on_all_others(tmp_path: Path, victim: int, method: str) -> None:
    """Within 30 s, the same text on all; the next try fails faster."""
    found = [one for one in run(tmp_path, 4, _lose, victim, method, "kill") if one is not None]
    assert len(found) == 3
    for one in found:
        assert one["ranks"] == [victim]
        assert one["text"] == found[0]["text"]
        assert f"rank {victim} (host {socket.gethostname()}) is silent" in one["text"]
        assert one["s"] < 30
        assert one["again"] == [victim]
        assert one["again_s"] < 6


def test_a_rank_that_left_is_named_at_once(tmp_path: Path) -> None:
    found = run(tmp_path, 3, _lose, 1, "agree", "close")
    for one in (found[0], found[2]):
        assert one["ranks"] == [1]
        assert "left" in one["text"]
        assert one["s"] < 2.5


def _again(rank: int) -> list[Any]:
    """A store that remembers a predecessor, as torchrun's does: what it said, to the letter of every key."""
    told: list[Any] = []
    for life in range(2):
        coordinator._instances = itertools.count()
        if life == 1:
            dist.barrier()
            time.sleep(0.3 * (rank == 0))  # the others are long there, and see their predecessor's call and go
        ranks = TorchCoordinator()
        told.append([value.decode() for value in ranks.agree(b"%d in life %d" % (rank, life))])
        told.append(ranks.broadcast(b"life %d" % life if rank == 0 else None).decode())
        ranks._life.stop()  # and no farewell
    dist.barrier()
    return told


def test_a_job_that_is_restarted_in_the_same_store_hears_nothing_of_its_predecessor(tmp_path: Path) -> None:
    for told in run(tmp_path, 3, _again):
        assert told == [
            [f"{rank} in life 0" for rank in range(3)], "life 0", [f"{rank} in life 1" for rank in range(3)], "life 1"
        ]  # fmt: skip


def _missing(rank: int) -> str:
    told = ""
    if rank != 2:
        with pytest.raises(RankLost) as caught:
            TorchCoordinator(patience_s=0.5)
        told = str(caught.value)
    dist.barrier()
    return told


def test_a_rank_that_opens_no_manager_is_named(tmp_path: Path) -> None:
    first, second, _ = run(tmp_path, 3, _missing)
    assert "rank 0 waited" in first
    assert "for rank 2 of 3" in first
    assert "rank 1 waited" in second
    assert "for rank 0 of 3" in second


def _interrupt(rank: int) -> list[Any]:
    class Interrupted(Exception):
        pass

    def ring(*_: object) -> None:
        raise Interrupted

    told: list[Any] = []
    with TorchCoordinator() as ranks:
        ranks.agree(b"all here")
        if rank == 1:
            signal.signal(signal.SIGALRM, ring)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        if rank == 2:
            time.sleep(1.0)
        for number in range(3):
            try:
                told.append([v.decode() for v in ranks.agree(b"%d" % (10 * rank + number))])
            except (RankLost, Interrupted) as error:
                told.append([type(error).__name__, str(error)])
        dist.barrier()
    return told


def test_a_rank_that_is_interrupted_breaks_it_for_all_and_all_go_on(tmp_path: Path) -> None:
    """One waits and is interrupted; the others are told who and why; the next operation works."""
    first, interrupted, last = run(tmp_path, 3, _interrupt)
    assert interrupted[0] == ["Interrupted", ""]
    assert first[0] == last[0]
    assert first[0][0] == "RankLost"
    assert "rank 1 (host" in first[0][1]
    assert first[1:] == interrupted[1:] == last[1:] == [["1", "11", "21"], ["2", "12", "22"]]


def _overhead(rank: int, rounds: int) -> list[float]:
    with TorchCoordinator() as ranks:
        ranks.agree(b"all here")
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            ranks.gather(b"x" * 1000)
            ranks.broadcast(b"y" * 1000 if rank == 0 else None)
            times.append(time.perf_counter() - began)
        dist.barrier()
    return sorted(times)


def test_alone_everything_is_ones_own() -> None:
    assert isinstance(current(None), Solo)
    solo = Solo()
    assert current(solo) is solo
    assert isinstance(solo, Coordinator)
    assert (solo.gather(b"a"), solo.broadcast(b"b"), solo.agree(b"c"), solo.channel("x")) == (
        [b"a"],
        b"b",
        [b"c"],
        solo,
    )
    with pytest.raises(ValueError, match="init_process_group"):
        TorchCoordinator()


if (
    __name__ == "__main__"
):  # PYTHONPATH=. python tests/distributed/test_coordinators.py: what a gather and a broadcast cost
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        times = run(Path(folder), 4, _overhead, 200)[0]
        print(
            f"gather and broadcast on 4 ranks: median {1e3 * times[100]:.2f} ms, worst of 200 {1e3 * times[-1]:.2f} ms"
        )
