"""Every disk that a power loss could leave of a long run, and what must be on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import pytest
from accidents import Run, garbage, is_version, tiny

from ckptman import CheckpointManager, keep
from ckptman.format.catalog import Entry
from ckptman.format.names import MARKER, Attempt, data_key
from ckptman.repository.head import Head, read_head
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.local import LocalStorage
from ckptman.testing.journal import Entry as Journaled
from ckptman.testing.journal import Linked, Made, Wrote
from ckptman.testing.power_loss import CrashState, RecordingSystem, crash_states

ACTIONS = 120


@dataclass(slots=True)
class Model:
    """What a root must list, worked out from the actions alone: step → tags, in the order of commits."""

    kept: int
    steps: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def save(self, step: int) -> None:
        self.steps[step] = self.steps.pop(step, ())
        last = [*self.steps][-self.kept :]
        self.steps = {step: tags for step, tags in self.steps.items() if tags or step in last}

    def tag(self, step: int, name: str) -> None:
        self.steps = {one: tuple(tag for tag in tags if tag != name) for one, tags in self.steps.items()}
        self.steps[step] += (name,)

    def __str__(self) -> str:
        return " ".join(f"{step}" + "".join(f"#{tag}" for tag in tags) for step, tags in self.steps.items())


def live(system: RecordingSystem, root: Path, actions: int) -> list[str]:
    """
    Save with pruning, save again, tag, delete, take a dead writer over, in a random order.

    Returns what is listed at first, and after each acknowledgement.
    """
    chooser = random.Random(3)
    model = Model(kept=3)
    listings = [str(model)]
    run: Run | None = None
    for step in range(actions):
        if run is None or chooser.random() < 0.05:  # the new one takes over, and sweeps what the old one left
            run = Run(LocalStorage(root, system=system), rule=keep.last(3))
        _act(chooser, run, model, step)
        listings.append(str(model))
        system.mark(listings[-1])
        if chooser.random() < 0.05:
            _die_while_saving(LocalStorage(root, system=system), nonce=chooser.randrange(1 << 32))
    assert run is not None
    run.manager.close()
    return listings


def _act(chooser: random.Random, run: Run, model: Model, step: int) -> None:
    known = [*model.steps]
    kind = chooser.choices(["new", "again", "tag", "delete"], [70, 10, 10, 10])[0]
    if kind == "tag" and known:
        tagged, name = chooser.choice(known), chooser.choice(["best", "good"])
        if name not in model.steps[tagged]:
            model.tag(tagged, name)
            run.manager.tag(tagged, name)
            return
    if kind == "delete" and known:
        gone = chooser.choice(known)
        del model.steps[gone]
        run.manager.delete(gone)
        return
    if kind == "again" and known:
        step = chooser.choice(known)
    model.save(step)
    run.save(step, step)


def _die_while_saving(storage: LocalStorage, *, nonce: int) -> None:
    """What a writer of this epoch leaves that is killed after its first file."""
    record = read_head(storage).record
    assert record is not None
    attempt = str(Attempt(step=ACTIONS, epoch=record.writer.epoch, nonce=f"{nonce:08x}"))
    with storage.open_new(data_key(attempt, "weights")) as file:
        file.write(b"half")


def written(journal: Sequence[Journaled]) -> dict[str, bytes]:
    """Path → all that was ever written to it. No path is used twice with other bytes."""
    nodes: dict[str, int] = {}
    contents: dict[int, bytes] = {}
    for entry in journal:
        match entry:
            case Made(path, node) if node is not None:
                nodes[path] = node
                contents[node] = b""
            case Wrote(node, data):
                contents[node] += data
            case Linked(source, target):
                nodes[target] = nodes[source]
    return {path: contents[node] for path, node in nodes.items()}


class Losses(NamedTuple):
    states: int
    lost: int
    torn: int
    examples: list[str]


class Judge:
    """Looks at one disk after the other. Remembers what it has read before: many disks share their files."""

    def __init__(self, journal: Sequence[Journaled]) -> None:
        self._written = written(journal)
        self._heads: dict[frozenset[tuple[str, bytes]], Head] = {}
        self._is_intact: dict[tuple[str, frozenset[tuple[str, bytes]]], bool] = {}

    def lists(self, state: CrashState) -> str:
        """The steps and tags that are listed."""
        return " ".join(f"{e.step}" + "".join(f"#{tag}" for tag in e.tags) for e in self._entries(state))

    def torn(self, state: CrashState) -> list[int]:
        """The steps that are listed, and are not byte for byte what was saved."""
        return [entry.step for entry in self._entries(state) if not self._check(state, entry)]

    def _entries(self, state: CrashState) -> tuple[Entry, ...]:
        catalog = frozenset((path, data) for path, data in state.tree.items() if path.startswith("root/catalog/"))
        if catalog not in self._heads:
            self._heads[catalog] = Repository(state.storage("root")).head()
        record = self._heads[catalog].record
        return record.checkpoints if record else ()

    def _check(self, state: CrashState, entry: Entry) -> bool:
        start = f"root/{entry.attempt}/"
        files = frozenset((path, data) for path, data in state.tree.items() if path.startswith(start))
        case = (entry.manifest, files)
        if case not in self._is_intact:
            names = {path for path in self._written if path.startswith(start)}
            same = {path for path, _ in files} == names and all(self._written[path] == data for path, data in files)
            self._is_intact[case] = same and not verify(Repository(state.storage("root")), entry)
        return self._is_intact[case]


def losses_of(
    system: RecordingSystem,
    root: Path,
    *,
    limit: int,
    actions: int = ACTIONS,
    on_state: Callable[[int, CrashState], None] = lambda count, state: None,
) -> Losses:
    """Live on *system*, then look at every disk that a power loss could leave (of each moment, *limit* at most)."""
    listings = live(system, root, actions)
    judge = Judge(system.journal)
    states = lost = torn = 0
    examples: list[str] = []
    for state in crash_states(system.journal, seed=7, limit_per_prefix=limit):
        states += 1
        done = len(state.acknowledged)
        try:
            found, bad = judge.lists(state), judge.torn(state)
        except Exception as error:  # noqa: BLE001 - on a broken system, anything counts as a loss
            found, bad = f"{type(error).__name__}: {error}", []
        is_lost = found not in listings[done : done + 2]
        lost += is_lost
        torn += bool(bad)
        if is_lost or bad:
            examples.append(f"after {done} acknowledgements and {state.length} calls: {found!r}, torn: {bad}")
            continue
        on_state(states, state)
    return Losses(states, lost, torn, examples[:5])


def goes_on(disk: CrashState) -> None:
    """The next writer saves, the newest checkpoint restores, and no garbage stays."""
    storage = disk.storage("root")
    before = [entry.step for entry in Repository(storage).entries()]
    fresh = Run(storage)
    if before:
        found = fresh.manager.restore()
        assert found is not None
        assert is_version(fresh.state, found.step)
        assert found.step == before[-1]
    fresh.save(999, 999)
    fresh.manager.close()
    state = tiny()
    with CheckpointManager(storage, state, rng=False) as manager:
        manager.restore()
    assert is_version(state, 999)
    assert [entry.step for entry in Repository(storage).entries()] == [*before, 999]
    assert garbage(storage) == []
    assert storage.size(MARKER)


@pytest.mark.timeout(300)
def test_no_power_loss_takes_what_was_acknowledged(scratch: Path) -> None:
    """
    Of every disk that a power loss may leave: it lists exactly what was acknowledged, or that with the one change
    that was under way; all that is listed is byte for byte what was saved; and on a sample, the run goes on.
    """
    continued = 0

    def on_state(count: int, state: CrashState) -> None:
        nonlocal continued
        if count % 100 == 0:
            goes_on(state)
            continued += 1

    system = RecordingSystem(scratch)
    losses = losses_of(system, scratch / "root", limit=120, on_state=on_state)
    print(
        f"{losses.states} crash states of {len(system.journal)} calls and {ACTIONS} acknowledgements: {losses.lost} "
        f"lost, {losses.torn} torn; {continued} continued"
    )
    assert losses.examples == []
    assert losses.states >= 20_000
    assert continued >= 200


class ForgetsFiles(RecordingSystem):
    """Its fsync of a file does nothing."""

    def fsync(self, file: FileIO) -> None:
        pass


class ForgetsNames(RecordingSystem):
    """Its fsync of a directory does nothing."""

    def fsync_dir(self, path: str) -> None:
        pass


@pytest.mark.filterwarnings("ignore::ckptman.repository.repository.DamagedCheckpointWarning")
@pytest.mark.parametrize("system", [ForgetsFiles, ForgetsNames])
def test_a_system_that_skips_fsync_is_found_out(scratch: Path, system: type[RecordingSystem]) -> None:
    """The test above can fail: without fsync of files, or of directories, it finds losses."""
    losses = losses_of(system(scratch), scratch / "root", limit=10, actions=25)
    print(f"{system.__name__}: {losses.states} states, {losses.lost} lost, {losses.torn} torn")
    assert losses.lost + losses.torn >= 25
