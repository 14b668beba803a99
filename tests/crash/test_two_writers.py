"""Two who want to write to one root: locks keep the peace, and where they cannot, nobody loses a checkpoint."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accidents import Child, Run, Tell, become, garbage, in_child, listing, tiny

from ckptman import CheckpointManager, CkptmanError, Fenced, LockTimeout, SaveFailed
from ckptman.format.catalog import read_record
from ckptman.format.digest import sha256
from ckptman.format.names import record_key
from ckptman.repository.head import record_numbers
from ckptman.repository.sweep import KEPT_RECORDS
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import Fault, FaultySystem, fail

AT_ONCE_S = 2.0


class Lockless(LocalStorage):
    """A storage that no file lock can guard, as object stores are."""

    @property
    def lock_path(self) -> Path | None:
        return None


def holder(root: Path, then: Callable[[Tell], object] = lambda tell: None) -> Callable[[Tell], None]:
    """A child that becomes the writer, saves step 1, says so, and stays."""

    def act(tell: Tell) -> None:
        run = Run(LocalStorage(root))
        run.save(1, 1)
        then(tell)
        tell("ready")
        signal.pause()

    return act


def takes_over_at_once(root: Path) -> None:
    began = time.monotonic()
    run = Run(LocalStorage(root), lock_timeout=30)
    run.save(2, 2)
    run.manager.close()
    assert time.monotonic() - began < AT_ONCE_S
    assert listing(LocalStorage(root)) == "1:1 2:2"


def test_the_second_waits_and_learns_who_the_first_is(scratch: Path) -> None:
    """It waits as long as it was told to, then names host, pid and age; once the first is killed, it goes on."""
    root = scratch / "root"
    with Child(holder(root)) as first:
        assert first.hear() == "ready"
        second = Run(LocalStorage(root), lock_timeout=0.3)
        began = time.monotonic()
        with pytest.raises(LockTimeout, match=rf"host {socket.gethostname()}, pid {first.pid}, for \d+ s") as caught:
            second.save(2, 2)
        assert time.monotonic() - began >= 0.3
        assert (caught.value.host, caught.value.pid) == (socket.gethostname(), first.pid)
        assert listing(LocalStorage(root)) == "1:1"
        first.kill()
        takes_over_at_once(root)


def test_the_second_takes_over_while_it_waits(scratch: Path) -> None:
    """A wait ends with the first one's death, not with the timeout."""
    root = scratch / "root"
    with Child(holder(root)) as first:
        assert first.hear() == "ready"
        killer = threading.Timer(0.2, first.send, [signal.SIGKILL])
        killer.start()
        takes_over_at_once(root)
        killer.join()


def test_a_child_of_the_dead_writer_keeps_no_lock(scratch: Path) -> None:
    """A process that the first one forked while it was the writer outlives it, and is in nobody's way."""

    def fork_one(tell: Tell) -> None:
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        tell(str(pid))

    root = scratch / "root"
    with Child(holder(root, fork_one)) as first:
        orphan = int(first.hear())
        try:
            assert first.hear() == "ready"
            first.kill()
            os.kill(orphan, 0)
            takes_over_at_once(root)
            os.kill(orphan, 0)
        finally:
            os.kill(orphan, signal.SIGKILL)


class _Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return index


def test_dataloader_workers_of_the_dead_writer_keep_no_lock(scratch: Path) -> None:
    """The workers of the first one's DataLoader live on for seconds; the second does not wait for them."""

    def load(tell: Tell) -> None:
        loader = torch.utils.data.DataLoader(_Numbers(), num_workers=2, persistent_workers=True)
        batches = iter(loader)
        next(batches)
        kept.append(batches)
        tell(" ".join(str(worker.pid) for worker in batches._workers))  # type: ignore[attr-defined]

    kept: list[object] = []
    root = scratch / "root"
    with Child(holder(root, load)) as first:
        workers = [int(pid) for pid in first.hear().split()]
        assert first.hear() == "ready"
        try:
            first.kill()
            for pid in workers:
                os.kill(pid, 0)
            takes_over_at_once(root)
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)


def test_a_second_manager_in_one_process_takes_over_at_once(scratch: Path) -> None:
    """A notebook's cell that runs again is not locked out by itself; the first manager is fenced."""
    storage = LocalStorage(scratch / "root")
    first, second = Run(storage), Run(LocalStorage(scratch / "root"))
    first.save(1, 1)
    second.save(2, 2)
    with pytest.raises(Fenced, match="another manager in this process"):
        first.save(3, 3)
    first.manager.close()
    second.save(4, 4)
    second.manager.close()
    assert listing(storage) == "1:1 2:2 4:4"


def test_a_forked_child_is_not_the_writer(scratch: Path) -> None:
    """A child that uses its parent's manager is fenced; the parent goes on, and still holds the lock."""
    storage = LocalStorage(scratch / "root")
    run = Run(storage)
    run.save(1, 1)

    def act(tell: Tell) -> None:
        for change in (lambda: run.save(2, 2), lambda: run.manager.delete(1)):
            try:
                change()
            except Fenced as error:
                tell(str(error))
        run.manager.close()

    told = in_child(act).told
    assert len(told) == 2
    assert all("was forked from the writer" in line for line in told)

    def second(tell: Tell) -> None:
        try:
            Run(LocalStorage(scratch / "root")).save(9, 9)
        except LockTimeout:
            tell("locked out")

    assert in_child(second).told == ["locked out"]
    run.save(3, 3)
    run.manager.close()
    assert listing(storage) == "1:1 3:3"


def pausing(at: int) -> FaultySystem:
    """A system that stops the process before call number *at*, until somebody sends SIGCONT; then the call happens."""
    return FaultySystem(Fault(at=at, strike=lambda: os.kill(os.getpid(), signal.SIGSTOP)))


def sleeper(root: Path, system: FaultySystem) -> Callable[[Tell], None]:
    """A child that saves step 3, is stopped somewhere on the way, and tries again; it tells both answers."""

    def act(tell: Tell) -> None:
        run = Run(Lockless(root, system=system))
        for step in (3, 4):
            try:
                run.save(step, step)
            except CkptmanError as error:
                tell(f"{type(error).__name__}: {error}")
            else:
                tell("saved")
        places = [(call.name, Path(call.path)) for call in system.calls]
        tell(" ".join(f"{name}@{path.parent.name}/{path.name}" for name, path in places))

    return act


def first_two(root: Path) -> None:
    run = Run(Lockless(root))
    run.save(1, 1)
    run.manager.close()


def test_a_writer_that_was_paused_anywhere_commits_nothing_after_it_was_replaced(scratch: Path) -> None:
    """
    Stopped at each call of a save, while another one takes over, saves and tags, then woken up: what it committed
    before stays; of what it had not, nothing appears; its next save is fenced, and no answer is wrong.
    """
    first_two(scratch / "counted")
    calls = in_child(sleeper(scratch / "counted", FaultySystem())).told[-1].split()
    answers: Counter[str] = Counter()
    for at in range(1, len(calls) + 1):
        root = scratch / "root"
        first_two(root)
        with Child(sleeper(root, pausing(at))) as first:
            assert first.wait_until_stopped()
            second = Run(Lockless(root))
            second.save(2, 2)
            second.manager.tag(2, "best")
            replaced = listing(Lockless(root))
            first.send(signal.SIGCONT)
            *told, _ = first.join()
        found = listing(Lockless(root))
        put = sum(call.startswith("link@catalog/") for call in calls[: at - 1])
        for step, answer in zip((3, 4), told, strict=True):
            assert (answer == "saved") == (f"{step}:{step}" in found.split()), (at, told)
        if put:  # it was the writer already, and had saved put - 1 checkpoints
            assert [answer == "saved" for answer in told] == [put > 1, put > 2], (at, told)
            assert found == replaced, (at, told)
            assert put > 1 or told[1].startswith("Fenced"), (at, told)
        answers[told[0].partition(":")[0]] += 1
        shutil.rmtree(root)
    print(f"stopped at each of {len(calls)} calls; the first answers were: {dict(answers)}")
    assert answers["Fenced"] >= 10
    assert set(answers) <= {"Fenced", "SaveFailed", "saved"}


def test_a_sleeper_below_swept_records_takes_its_record_back(scratch: Path) -> None:
    """
    Stopped just before it puts its record; meanwhile others commit so much that its number is swept and free again.
    Its put succeeds, below the truth; it notices, removes the record and is fenced.
    """
    root = scratch / "root"
    first_two(scratch / "counted")
    calls = in_child(sleeper(scratch / "counted", FaultySystem())).told[-1].split()
    puts = [at for at, call in enumerate(calls, 1) if call.startswith("open_new@catalog/.tmp-")]
    first_two(root)
    with Child(sleeper(root, pausing(puts[1]))) as first:  # the first one was that of the new writer
        assert first.wait_until_stopped()
        number = record_numbers(Lockless(root))[-1] + 1
        second = Run(Lockless(root))
        second.save(2, 2)
        for count in range(KEPT_RECORDS + 5):
            second.manager.tag(1 + count % 2, "best")
        assert number not in record_numbers(Lockless(root))
        expected = listing(Lockless(root))
        first.send(signal.SIGCONT)
        told = first.join()
    assert told[0].startswith("Fenced"), told
    assert "slept" in told[0]
    assert number not in record_numbers(Lockless(root))
    assert listing(Lockless(root)) == expected
    assert garbage(Lockless(root)) == []
    second.save(5, 5)


WRITERS = 3
SAVES = 6


def test_writers_that_race_without_a_lock_lose_nothing(scratch: Path) -> None:
    """
    Processes that take one root from each other all the time: every save that was acknowledged is listed in the end,
    all that is listed is intact, and the records form one chain.
    """
    root = scratch / "root"

    def racing(name: int) -> Callable[[Tell], None]:
        def act(tell: Tell) -> None:
            run = Run(Lockless(root))
            step = 1000 * name
            goal = step + SAVES
            for _ in range(2000):
                try:
                    run.save(step, step)
                except (Fenced, SaveFailed):
                    run.manager.close()
                    run = Run(Lockless(root))
                else:
                    tell(f"{step}:{step}")
                    step += 1
                if step == goal:
                    return
            raise AssertionError(f"writer {name} starved at {step}")

        return act

    children = [Child(racing(name)) for name in range(1, WRITERS + 1)]
    acknowledged = {line for child in children for line in child.join()}
    assert len(acknowledged) == WRITERS * SAVES
    storage = Lockless(root)
    assert acknowledged <= set(listing(storage).split())
    records = [
        (number, storage.read(record_key(number), limit=1 << 20), read_record) for number in record_numbers(storage)
    ]
    for (below, data, _), (number, above, read) in itertools.pairwise(records):
        assert number == below + 1
        assert read(above, number).previous == sha256(data)
    writers = {read(data, number).writer.id for number, data, read in records}
    print(f"{len(acknowledged)} saves acknowledged, {len(records)} records kept, of {len(writers)} writers; 0 lost")
    assert len(writers) >= WRITERS


@pytest.mark.parametrize("link", [2, 3], ids=["take over", "save"])
def test_a_lost_answer_is_found_out(scratch: Path, link: int) -> None:
    """The link took effect, its answer was lost: the nonce in the record tells that it was ours."""
    state = tiny()
    system = FaultySystem(fail(link, errno.EIO, name="link", moment="after"))
    with CheckpointManager(LocalStorage(scratch / "root", system=system), state, rng=False) as manager:
        become(state, 1)
        manager.save(1, block=True)
    assert system.struck == 1
    assert listing(LocalStorage(scratch / "root")) == "1:1"
    assert len(record_numbers(LocalStorage(scratch / "root"))) == 2
