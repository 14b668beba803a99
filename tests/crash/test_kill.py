"""SIGKILL, for real, at every call that changes the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from accidents import UNREADABLE, Run, Tell, become, garbage, in_child, listing, restores_all

from ckptman import keep
from ckptman.format.names import record_key
from ckptman.repository.changes import retained
from ckptman.repository.head import record_numbers
from ckptman.repository.ownership import take
from ckptman.repository.repair import repair
from ckptman.storage.local import LocalStorage
from ckptman.storage.system import SYSTEM, System
from ckptman.testing.faults import FaultySystem, Moment, sigkill

Act = Callable[[LocalStorage, Callable[[], None]], None]
"""Do several things to a root, and call the function after each one that was acknowledged."""


class NoLinks(System):
    """A filesystem without hard links: there, a kill may leave half a record or half a marker under its name."""

    def link(self, source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


NO_LINKS = NoLinks()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """
    What a process does before it is killed, and what its root may list then.

    Attributes:
        prepare: Fills a new root.
        act: What the process does.
        listings: What is listed at first, and after each acknowledgement.
        unrepaired: What may be listed instead of the first one, because the root is damaged at first.
        inner: The system that the process uses.
        least_points: How many kills the sweep must cover at least.
    """

    prepare: Callable[[Path], None]
    act: Act
    listings: tuple[str, ...]
    least_points: int
    unrepaired: str | None = None
    inner: System = SYSTEM

    def allowed(self, acknowledged: int) -> tuple[str, ...]:
        """What the root lists after *acknowledged* acknowledgements: that, or what the next one is going to say."""
        return self.listings[acknowledged : acknowledged + 2]


def saved(*steps: int) -> Callable[[Path], None]:
    def prepare(root: Path) -> None:
        run = Run(LocalStorage(root))
        for step in steps:
            run.save(step, step)
        run.manager.close()

    return prepare


def with_garbage(root: Path) -> None:
    """Steps 1 and 2, and what a writer left that was killed while it saved step 3."""
    saved(1, 2)(root)
    calls = len(counted(root.with_name("counting"), saved(1, 2), first_save))
    system = FaultySystem(sigkill(calls - 9))
    assert in_child(lambda tell: first_save(LocalStorage(root, system=system), lambda: None)).was_killed
    assert garbage(LocalStorage(root))


def with_damaged_records(*damaged: int) -> Callable[[Path], None]:
    """Steps 1 to 3; of the records, counted from the newest, *damaged* have a flipped bit (none given: all)."""

    def prepare(root: Path) -> None:
        saved(1, 2, 3)(root)
        numbers = record_numbers(LocalStorage(root))[::-1]
        for number in [numbers[i] for i in damaged] or numbers:
            path = root / record_key(number)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

    return prepare


def with_damaged_marker(root: Path) -> None:
    saved(1, 2)(root)
    (root / "ckptman.json").write_bytes(b"{")


def first_save(storage: LocalStorage, ack: Callable[[], None]) -> None:
    Run(storage).save(5, 5)
    ack()


def pruning(storage: LocalStorage, ack: Callable[[], None]) -> None:
    run = Run(storage, rule=keep.last(2))
    for step in (3, 4):
        run.save(step, step)
        ack()


def resave(storage: LocalStorage, ack: Callable[[], None]) -> None:
    Run(storage).save(1, 7)
    ack()


def save_behind(storage: LocalStorage, ack: Callable[[], None]) -> None:
    run = Run(storage)
    for step in (1, 2):
        become(run.state, step)
        pending = run.manager.save(step)
        become(run.state, 1000)  # training goes on
        pending.result()
        ack()
    run.manager.close()


def deleting(storage: LocalStorage, ack: Callable[[], None]) -> None:
    run = Run(storage)
    for step in (2, 3):
        run.manager.delete(step)
        ack()


def tagging(storage: LocalStorage, ack: Callable[[], None]) -> None:
    run = Run(storage)
    run.manager.tag(1, "best")
    ack()
    run.manager.tag(2, "best")
    ack()
    run.manager.untag(2, "best")
    ack()
    run.manager.close()


def prune(storage: LocalStorage, ack: Callable[[], None]) -> None:
    take(storage, timeout_s=0, change=lambda e: retained(e, keep.last(1), storage.url), what="prune").release()
    ack()


def gc(storage: LocalStorage, ack: Callable[[], None]) -> None:
    take(storage, timeout_s=0, what="gc").release()
    ack()


def repairing(storage: LocalStorage, ack: Callable[[], None]) -> None:
    repair(storage, timeout_s=0)
    ack()


SCENARIOS = {
    "first save": Scenario(least_points=80, prepare=lambda root: None, act=first_save, listings=("", "5:5")),
    "save and prune": Scenario(
        least_points=120, prepare=saved(1, 2), act=pruning, listings=("1:1 2:2", "2:2 3:3", "3:3 4:4")
    ),
    "save again": Scenario(least_points=70, prepare=saved(1, 2), act=resave, listings=("1:1 2:2", "2:2 1:7")),
    "save behind": Scenario(
        least_points=120, prepare=lambda root: None, act=save_behind, listings=("", "1:1", "1:1 2:2")
    ),
    "delete": Scenario(
        least_points=60, prepare=saved(1, 2, 3), act=deleting, listings=("1:1 2:2 3:3", "1:1 3:3", "1:1")
    ),
    "tag": Scenario(
        least_points=60,
        prepare=saved(1, 2),
        act=tagging,
        listings=("1:1 2:2", "1:1#best 2:2", "1:1 2:2#best", "1:1 2:2"),
    ),
    "prune": Scenario(least_points=30, prepare=saved(1, 2, 3), act=prune, listings=("1:1 2:2 3:3", "3:3")),
    "gc after a dead writer": Scenario(least_points=25, prepare=with_garbage, act=gc, listings=("1:1 2:2", "1:1 2:2")),
    "take over a dead writer": Scenario(
        least_points=70, prepare=with_garbage, act=first_save, listings=("1:1 2:2", "1:1 2:2 5:5")
    ),
    "save on a damaged record": Scenario(
        least_points=60,
        prepare=with_damaged_records(0),
        act=first_save,
        listings=("1:1 2:2 3:3", "1:1 2:2 3:3 5:5"),
        unrepaired="1:1 2:2",
    ),
    "repair a damaged record": Scenario(
        least_points=20,
        prepare=with_damaged_records(0, 1),
        act=repairing,
        listings=("1:1 2:2 3:3", "1:1 2:2 3:3"),
        unrepaired="1:1",
    ),
    "repair without records": Scenario(
        least_points=20,
        prepare=with_damaged_records(),
        act=repairing,
        listings=("1:1 2:2 3:3", "1:1 2:2 3:3"),
        unrepaired=UNREADABLE,
    ),
    "repair the marker": Scenario(
        least_points=35, prepare=with_damaged_marker, act=repairing, listings=("1:1 2:2", "1:1 2:2")
    ),
    "first save without links": Scenario(
        least_points=100, prepare=lambda root: None, act=first_save, listings=("", "5:5"), inner=NO_LINKS
    ),
    "save without links": Scenario(
        least_points=75, prepare=saved(1, 2), act=first_save, listings=("1:1 2:2", "1:1 2:2 5:5"), inner=NO_LINKS
    ),
}


def counted(root: Path, prepare: Callable[[Path], None], act: Act, inner: System = SYSTEM) -> list[str]:
    """The names of the calls that *act* makes in a root of its own when nobody kills it."""
    prepare(root)
    system = FaultySystem(inner=inner)

    def run(tell: Tell) -> None:
        act(LocalStorage(root, system=system), lambda: None)
        tell(" ".join(call.name for call in system.calls))

    fate = in_child(run)
    shutil.rmtree(root)
    return fate.told[-1].split()


def points(calls: list[str]) -> Iterator[tuple[int, Moment]]:
    """Before and after every call, and in the middle of every write."""
    for at, name in enumerate(calls, 1):
        yield at, "before"
        if name == "write":
            yield at, "torn"
        yield at, "after"


def kill_at(root: Path, scenario: Scenario, at: int, moment: Moment, name: str) -> int | None:
    """
    Run the scenario's process on *root* and kill it; return how many acknowledgements it had given.

    None where it lived: what is missing or not empty is not removed, so there is no moment after that.
    """
    system = FaultySystem(sigkill(at, moment=moment), inner=scenario.inner)
    fate = in_child(lambda tell: scenario.act(LocalStorage(root, system=system), lambda: tell("ack")))
    if not fate.was_killed and moment == "after" and name in ("rmdir", "unlink", "link"):
        return None
    assert fate.was_killed, f"call {at} was never made"
    return len(fate.told)


def check_survivor(root: Path, scenario: Scenario, acknowledged: int, *, restoring: bool) -> None:
    storage = LocalStorage(root)
    allowed = scenario.allowed(acknowledged)
    found = listing(storage)
    damaged = scenario.unrepaired is not None and acknowledged == 0 and found == scenario.unrepaired
    assert damaged or found in allowed
    if restoring and found != UNREADABLE:
        restores_all(storage, found)
    if found == UNREADABLE or scenario.act is repairing or scenario.inner is NO_LINKS:
        repair(storage, timeout_s=0)
    run = Run(storage)
    run.save(99, 99)  # with a lock timeout of 0: the dead hold no lock
    run.manager.close()
    assert listing(storage) in {f"{one} 99:99".strip() for one in allowed}
    assert garbage(storage) == []
    assert not list(root.glob("*/.tmp-*"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_process_loses_nothing_that_it_acknowledged(name: str, scratch: Path) -> None:
    """
    Killed at any call of a save, prune, delete, tag, gc or repair: what is listed is exactly what was acknowledged, or
    that with the one change that was under way. All of it is intact, the next save works at once, no garbage is left.
    """
    scenario, covered = SCENARIOS[name], 0
    calls = counted(scratch / "counted", scenario.prepare, scenario.act, scenario.inner)
    template = scratch / "template"
    scenario.prepare(template)
    for at, moment in points(calls):
        root = scratch / "root"
        if template.exists():
            shutil.copytree(template, root)
        acknowledged = kill_at(root, scenario, at, moment, calls[at - 1])
        if acknowledged is not None:
            covered += 1
            try:
                check_survivor(root, scenario, acknowledged, restoring=covered % 10 == 0)
            except Exception as error:
                error.add_note(f"{name}: killed {moment} call {at} of {len(calls)} ({calls[at - 1]})")
                raise
        shutil.rmtree(root, ignore_errors=True)
    print(f"{name}: {covered} kill points, 0 lost")
    assert covered >= scenario.least_points
