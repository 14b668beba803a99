"""Ranks that share only a storage: they find each other, not their predecessors; who is late, who is missing."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ckptman.coordination.jobs import folder_name, place
from ckptman.coordination.joining import _Meeting
from ckptman.coordination.leftovers import Leftovers
from ckptman.coordinator import Coordinator, FilesCoordinator, RankLost
from ckptman.errors import StorageError
from ckptman.storage.base import Storage, check_key
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage

FOLDER = "ranks/job-a"


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, scratch: Path) -> Storage:
    return LocalStorage(scratch / "root") if request.param == "local" else MemoryStorage("files")


def started(world_size: int, rank: Callable[[int], Any], ranks: list[int] | None = None) -> list[Future[Any]]:
    """*rank* called with each number, on a thread of its own: no rank shares anything with another but the storage."""
    pool = ThreadPoolExecutor(world_size)
    futures = [pool.submit(rank, number) for number in (range(world_size) if ranks is None else ranks)]
    pool.shutdown(wait=False)
    return futures


def results(futures: list[Future[Any]]) -> list[Any]:
    return [future.result(60) for future in futures]


def talk(storage: Storage, rank: int, world_size: int, words: str, **more: Any) -> list[str]:
    with FilesCoordinator(storage, rank=rank, world_size=world_size, job="a", **more) as ranks:
        assert isinstance(ranks, Coordinator)
        return [value.decode() for value in ranks.agree(f"{words}{rank}".encode())]


def test_ranks_find_each_other_and_leave_nothing(storage: Storage) -> None:
    """All say something, all hear all; in another channel too; nothing of it stays in the storage."""

    def rank(number: int) -> list[Any]:
        with FilesCoordinator(storage, rank=number, world_size=3, job="a") as ranks:
            other = ranks.channel("other")
            said = [ranks.agree(b"%d" % number), other.agree(b"x%d" % number), ranks.agree(bytes(number))]
            said.append(ranks.broadcast(b"told" if number == 0 else None))
            return [*said, ranks.gather(b"mine")]

    found = results(started(3, rank))
    assert found[0][:4] == found[1][:4] == found[2][:4]
    assert found[0][:4] == [[b"0", b"1", b"2"], [b"x0", b"x1", b"x2"], [b"", b"\0", b"\0\0"], b"told"]
    assert [one[4] for one in found] == [[b"mine"] * 3, None, None]
    assert storage.listing("") == []


def test_a_late_rank_is_waited_for_whoever_it_is(storage: Storage) -> None:
    for late in (0, 2):
        early = started(3, lambda number: talk(storage, number, 3, "r"), [n for n in range(3) if n != late])
        time.sleep(0.3)
        assert not any(future.done() for future in early)
        assert results([*early, *started(1, lambda _, n=late: talk(storage, n, 3, "r"))]) == [["r0", "r1", "r2"]] * 3


def test_a_missing_rank_is_named(storage: Storage) -> None:
    """On rank 0 with its number; the others say that rank 0 did not begin."""
    futures = started(4, lambda number: talk(storage, number, 4, "r", timeout_s=0.5), [0, 2])
    with pytest.raises(RankLost, match=r"of 4 ranks, these did not come .*: 1, 3\.") as caught:
        futures[0].result(60)
    assert caught.value.ranks == (1, 3)
    with pytest.raises(RankLost, match=r"rank 2 waited .* for rank 0") as caught:
        futures[1].result(60)
    assert caught.value.ranks == (0,)


def predecessor(storage: Storage, number: int, died: str, ready: Path) -> None:
    """A rank of two that gets as far as *died* says, then waits to be killed."""
    if died == "answered" and number == 0:
        nonce = secrets.token_hex(8)
        _Meeting(storage, FOLDER, rank=0, world_size=2, nonce=nonce, host="h").call()
        ready.touch()
        time.sleep(60)
    if died == "called" and number == 1:
        ready.touch()
        time.sleep(60)
    ranks = FilesCoordinator(storage, rank=number, world_size=2, job="a")
    if died == "spoke":
        ranks._board.pin(f"main.0.{1 - number}.{number}", b"gbold"[number:])  # what the next operations look for
    ready.touch()
    time.sleep(60)


def is_as_far_as(storage: Storage, died: str, scratch: Path) -> bool:
    if died in ("called", "answered"):
        names = [stored.key for stored in storage.listing(FOLDER)]
        return any((".call" if died == "called" else ".here.1.") in name for name in names)
    return all((scratch / f"ready-{number}").exists() for number in range(2))


@pytest.mark.parametrize("died", ["called", "answered", "gone on", "spoke"])
def test_a_restarted_job_never_meets_its_predecessor(scratch: Path, died: str) -> None:
    """
    Killed after its ranks had called, answered, gone on, or spoken; then started again under the same name, with
    rank 1 there long before rank 0: each hears what the new ranks said, not what the dead ones did.
    """
    storage = LocalStorage(scratch / "root")
    pids = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                predecessor(storage, number, died, scratch / f"ready-{number}")
            finally:
                os._exit(0)
        pids.append(pid)
    while not is_as_far_as(storage, died, scratch):
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert storage.listing(FOLDER)
    futures = started(2, lambda number: talk(storage, number, 2, "new"), [1])
    time.sleep(0.2)
    futures += started(2, lambda number: talk(storage, number, 2, "new"), [0])
    assert results(futures) == [["new0", "new1"]] * 2


def test_a_killed_rank_is_named_and_a_live_one_is_not(scratch: Path) -> None:
    """Rank 1 dies, rank 2 is slow: rank 1 alone is lost, on rank 0 and, with the same words, on rank 2."""
    storage = LocalStorage(scratch / "root")
    pid = os.fork()
    if pid == 0:
        try:
            with FilesCoordinator(storage, rank=1, world_size=3, job="a", silence_s=2.0) as ranks:
                ranks.agree(b"here")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)

    def rank(number: int) -> tuple[str, float]:
        with FilesCoordinator(storage, rank=number, world_size=3, job="a", silence_s=2.0) as ranks:
            ranks.agree(b"here")
            began = time.monotonic()
            with pytest.raises(RankLost, match="rank 1 ") as caught:
                ranks.agree(b"again")
            assert caught.value.ranks == (1,)
            return str(caught.value), time.monotonic() - began

    (first, first_s), (second, second_s) = results(started(3, rank, [0, 2]))
    os.waitpid(pid, 0)
    assert first == second
    assert max(first_s, second_s) < 15


def test_a_rank_that_lives_and_does_not_come_is_given_up() -> None:
    """After the patience that was asked for, with its number and the same words on both; then they go on."""
    storage = MemoryStorage("patience")

    def rank(number: int) -> list[str]:
        with FilesCoordinator(storage, rank=number, world_size=2, job="a", patience_s=2.5) as ranks:
            ranks.agree(b"here")
            if number:
                gone_on.wait(30)
            with pytest.raises(RankLost) as caught:
                ranks.agree(b"again")
            gone_on.set()
            assert caught.value.ranks == (1,)
            return [str(caught.value), *map(bytes.decode, ranks.agree(b"and again"))]

    gone_on = threading.Event()
    first, second = results(started(2, rank))
    assert first == second
    assert "did not come within" in first[0]
    assert first[1:] == ["and again"] * 2


def test_two_processes_that_say_they_are_one_rank_never_both_take_part(storage: Storage) -> None:
    """One of them is refused, or left out; nobody hears a mixture."""

    def rank(number: int) -> list[bytes]:
        with FilesCoordinator(storage, rank=min(number, 1), world_size=2, job="a", timeout_s=2) as ranks:
            return ranks.agree(b"%d" % number)

    futures = started(3, rank, [1, 2, 0])
    errors = [future.exception(60) for future in futures]
    assert any(errors[:2])
    assert all(error is None or isinstance(error, (StorageError, RankLost)) for error in errors)
    heard = {repr(future.result()) for future, error in zip(futures, errors, strict=True) if error is None}
    assert len(heard) <= 1


def test_what_the_dead_left_is_swept_and_what_lives_is_not(storage: Storage) -> None:
    """Only what did not change between two looks, long enough apart."""
    with FilesCoordinator(storage, rank=0, world_size=1, job="live", silence_s=0.5) as live:
        storage.create("ranks/job-dead/00000000000000aa.call", b"")
        storage.create("ranks/job-dead/00000000000000aa.beat.0.7", b"")
        storage.create("step-1/model.safetensors", b"")
        early = Leftovers(storage, dead_after_s=60)
        early.sweep()
        assert len(storage.listing("ranks/job-dead")) == 2
        leftovers = Leftovers(storage, dead_after_s=0.3)
        beats = {stored.key for stored in storage.listing("ranks/job-live")}
        while {stored.key for stored in storage.listing("ranks/job-live")} == beats:
            time.sleep(0.05)
        time.sleep(0.3)
        leftovers.sweep()
        assert storage.listing("ranks/job-dead") == []
        assert live.agree(b"alive") == [b"alive"]
        assert live._board.has("go")
    assert [stored.key for stored in storage.listing("")] == ["step-1/model.safetensors"]


def test_a_session_that_was_swept_under_a_sleeper_says_so(storage: Storage) -> None:
    with FilesCoordinator(storage, rank=0, world_size=1, job="a") as ranks:
        ranks.agree(b"here")
        storage.delete([stored.key for stored in storage.listing("ranks")])
        with pytest.raises(StorageError, match="was cleared"):
            ranks.agree(b"again")


ENVIRONMENTS = [
    ({"RANK": "3", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"}, (3, 8, "x-2")),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}, (1, 4, "77-0")),
    (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1",
         "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6"},
        (5, 6, "7-1"),
    ),
    ({"PMI_RANK": "0", "PMI_SIZE": "2", "PBS_JOBID": "12.host"}, (0, 2, "12.host")),
]  # fmt: skip


@pytest.mark.parametrize(("environ", "expected"), ENVIRONMENTS)
def test_the_launcher_says_which_rank_of_which_job(environ: dict[str, str], expected: tuple[int, int, str]) -> None:
    """The nearest launcher wins; what is given wins over all; restarts of a job have names of their own."""
    found = place(environ, rank=None, world_size=None, job=None)
    assert (found.rank, found.world_size, found.job) == expected
    given = place(environ, rank=0, world_size=2, job="mine")
    assert (given.rank, given.world_size, given.job) == (0, 2, "mine")


def test_what_is_not_known_is_asked_for() -> None:
    for environ, arguments, text in [
        ({}, {}, "which rank"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, "which job"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, {}, "RANK='x'"),
        ({}, {"rank": 0}, "both"),
        ({}, {"rank": 2, "world_size": 2}, "from 0 to"),
    ]:
        with pytest.raises(ValueError, match=text):
            place(environ, **{"rank": None, "world_size": None, "job": None, **arguments})


def test_a_job_has_a_folder_of_its_own_whatever_it_is_called() -> None:
    jobs = ["a", "a-1", "a/1", "a:1", "12.host", "..", "con", "x" * 500, "x" * 501, "ä"]
    names = [folder_name(job) for job in jobs]
    assert len(set(names)) == len(jobs)
    for name in names:
        check_key(f"ranks/{name}/00000000000000aa.main-steps.12.345.beat")
