"""The mirror: it gets everything, it never harms training, and a restore takes the newest intact one of both."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from ckptman import CheckpointManager, DamagedCheckpointWarning, Mirror, keep
from ckptman.errors import CheckpointNotFound, IntegrityError, StorageError
from ckptman.events import Event, Mirrored, MirrorErred, Restored
from ckptman.format.catalog import Entry
from ckptman.pipeline import mirroring
from ckptman.repository.ownership import take
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.base import Storage
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage
from ckptman.testing.faults import FaultySystem, sigkill

WAIT_S = 20.0


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirroring.Mirroring.__init__, "__kwdefaults__", {"pause_s": 0.01})


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "ckptman-mirror":
            thread.join(WAIT_S)
            assert not thread.is_alive()


class Told:
    """A hook that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def wait(self, is_there: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(is_there, WAIT_S)

    def wait_for(self, kind: type[Event], count: int = 1) -> None:
        self.wait(lambda: len(self.of(kind)) >= count)


class Flaky(MemoryStorage):
    """Unreachable while ``is_down``; each new data file waits for ``gate``."""

    def __init__(self) -> None:
        super().__init__("flaky")
        self.is_down = False
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Event()

    def _check(self) -> None:
        if self.is_down:
            raise StorageError("no route to host")

    def listing(self, folder):  # type: ignore[no-untyped-def]
        self._check()
        return super().listing(folder)

    def create(self, key, data):  # type: ignore[no-untyped-def]
        self._check()
        super().create(key, data)

    def read(self, key, *, limit):  # type: ignore[no-untyped-def]
        self._check()
        return super().read(key, limit=limit)

    def open_new(self, key):  # type: ignore[no-untyped-def]
        self._check()
        if key.endswith(".safetensors"):
            self.at_gate.set()
            assert self.gate.wait(WAIT_S)
            self._check()
        return super().open_new(key)


def steps(storage: Storage) -> list[int]:
    return [entry.step for entry in Repository(storage).entries()]


def assert_intact(storage: Storage) -> None:
    for entry in Repository(storage).entries():
        assert verify(Repository(storage), entry) == []


class Run:
    """A training run: its only weight is the step."""

    def __init__(self, root: object, mirror: object, **arguments: object) -> None:
        self.x = torch.zeros(1000)
        self.told = Told()
        self.manager = CheckpointManager(root, {"x": self.x}, mirror=mirror, hooks=[self.told], **arguments)  # type: ignore[arg-type]

    def save(self, step: int, **arguments: object) -> None:
        self.x.fill_(step)
        self.manager.save(step, block=True, **arguments)  # type: ignore[arg-type]

    def restore(self, which: object = "latest") -> int | None:
        """The step, after looking whether the weight is that of the step."""
        found = self.manager.restore(which)  # type: ignore[arg-type]
        assert found is None or self.x.eq(found.step).all()
        self.found = found
        return None if found is None else found.step

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.manager.close()


def flip(root: Path, step: int) -> None:
    (path,) = root.glob(f"step-{step:012d}.*/x.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# what arrives


def test_every_checkpoint_arrives(tmp_path: Path) -> None:
    """With metrics and tags, in order, intact; each is an event with the mirror's own checkpoint in it."""
    mirror = LocalStorage(tmp_path / "mirror")
    with Run(tmp_path / "root", tmp_path / "mirror") as run:
        for step in (1, 2, 3):
            run.save(step, metrics={"loss": 1 / step}, tags=(f"t{step}",))
            run.told.wait_for(Mirrored, step)
    assert steps(mirror) == [1, 2, 3]
    assert_intact(mirror)
    assert [(e.metrics, e.tags) for e in Repository(mirror).entries()] == [
        (e.metrics, e.tags) for e in Repository(LocalStorage(tmp_path / "root")).entries()
    ]
    event = run.told.of(Mirrored)[-1]
    assert isinstance(event, Mirrored)
    assert (event.root, event.mirror) == (str(tmp_path / "root"), str(tmp_path / "mirror"))
    assert event.checkpoint.step == 3
    assert event.checkpoint.url.startswith(event.mirror)
    assert event.sent_nbytes > 4000


def test_the_newest_is_there_when_close_returns(tmp_path: Path) -> None:
    """Without waiting for anything else before."""
    mirror = MemoryStorage()
    with Run(tmp_path, mirror) as run:
        for step in range(1, 6):
            run.save(step)
    assert steps(mirror)[-1] == 5


def test_what_is_committed_while_the_mirror_is_looked_at_is_there_too(tmp_path: Path) -> None:
    """The mirror is slow: its thread read the root before the commit, and the manager closes before it answers."""

    class Slow(Flaky):
        def listing(self, folder):  # type: ignore[no-untyped-def]
            self.at_gate.set()
            assert self.gate.wait(WAIT_S)
            return super().listing(folder)

    mirror = Slow()
    mirror.gate.clear()
    run = Run(tmp_path, mirror)
    with pytest.raises(CheckpointNotFound):
        run.manager.tag(7, "none")  # becomes the writer, and commits nothing more
    assert mirror.at_gate.wait(WAIT_S)
    run.save(1)
    closing = threading.Thread(target=run.manager.close)
    closing.start()
    while not run.manager._mirroring._is_closing:  # type: ignore[union-attr]
        closing.join(0.01)
    mirror.gate.set()
    closing.join(WAIT_S)
    assert steps(mirror) == [1]


def test_each_has_its_own_keep(tmp_path: Path) -> None:
    """The root drops what the mirror keeps, and the other way round."""
    mirror, other = MemoryStorage(), MemoryStorage()
    with Run(tmp_path / "a", mirror, keep=keep.last(1)) as run:
        for step in (1, 2, 3):
            run.save(step)
            run.told.wait_for(Mirrored, step)
    assert (steps(LocalStorage(tmp_path / "a")), steps(mirror)) == ([3], [1, 2, 3])
    with Run(tmp_path / "b", Mirror(other, keep=keep.last(2))) as run:
        for step in (1, 2, 3):
            run.save(step)
            run.told.wait_for(Mirrored, step)
    assert (steps(LocalStorage(tmp_path / "b")), steps(other)) == ([1, 2, 3], [2, 3])
    assert_intact(other)


def test_tags_and_saves_of_the_same_step_follow(tmp_path: Path) -> None:
    """A tag given later; a step saved again replaces the first one there too."""
    mirror = MemoryStorage()
    with Run(tmp_path, mirror) as run:
        run.save(1)
        run.told.wait_for(Mirrored, 1)
        run.save(2)
        run.told.wait_for(Mirrored, 2)
        run.save(1)
        run.told.wait_for(Mirrored, 3)
        run.manager.tag(1, "good")
    assert [(e.step, e.tags) for e in Repository(mirror).entries()] == [(2, ()), (1, ("good",))]


def test_a_late_mirror_catches_up(tmp_path: Path) -> None:
    """A root with a history gets a mirror: with the first save, all that the mirror would keep goes there."""
    with CheckpointManager(tmp_path, {"x": torch.ones(3)}) as manager:
        for step in (1, 2, 3):
            manager.save(step, block=True)
    mirror = MemoryStorage()
    with Run(tmp_path, Mirror(mirror, keep=keep.last(3)), rng=False) as run:
        run.x.resize_(3)
        run.save(4)
        run.told.wait_for(Mirrored, 3)
    assert steps(mirror) == [2, 3, 4]


# an unreachable mirror


def test_a_mirror_that_is_away_for_a_while(tmp_path: Path) -> None:
    """Saves go on; each failure is told with its retry; when it is back, all of them arrive, the newest first."""
    mirror = Flaky()
    mirror.is_down = True
    with Run(tmp_path, mirror) as run:
        for step in (1, 2, 3):
            run.save(step)
        run.told.wait_for(MirrorErred, 2)
        event = run.told.of(MirrorErred)[0]
        assert isinstance(event, MirrorErred)
        assert "no route to host" in str(event.error)
        assert event.retry_s is not None
        mirror.is_down = False
        run.told.wait_for(Mirrored, 3)
    assert steps(mirror) == [1, 2, 3]
    assert [event.checkpoint.step for event in run.told.of(Mirrored)] == [3, 2, 1]  # type: ignore[attr-defined]
    assert_intact(mirror)


def test_a_mirror_that_goes_away_in_the_middle(tmp_path: Path) -> None:
    """While a file is being sent; the same writer goes on when it is back."""
    mirror = Flaky()
    with Run(tmp_path, mirror) as run:
        mirror.gate.clear()
        run.save(1)
        assert mirror.at_gate.wait(WAIT_S)
        mirror.is_down = True
        mirror.gate.set()
        run.told.wait_for(MirrorErred)
        mirror.is_down = False
        run.told.wait_for(Mirrored)
    assert_intact(mirror)
    assert steps(mirror) == [1]


def test_a_mirror_that_stays_away(tmp_path: Path) -> None:
    """Neither a save nor close fails or waits for it; the next run catches up."""
    mirror = Flaky()
    mirror.is_down = True
    with Run(tmp_path, mirror) as run:
        for step in (1, 2):
            run.save(step)
        run.told.wait_for(MirrorErred)
    assert run.told.of(MirrorErred)[-1].retry_s is None  # type: ignore[attr-defined]
    assert steps(LocalStorage(tmp_path)) == [1, 2]
    mirror.is_down = False
    with Run(tmp_path, mirror) as run:
        run.save(3)
        run.told.wait_for(Mirrored, 3)
    assert steps(mirror) == [1, 2, 3]


def test_any_error_of_a_foreign_mirror_is_an_event(tmp_path: Path) -> None:
    """Even one that no storage should raise, and a keep rule that fails."""

    def broken(history: object) -> frozenset[int]:
        raise ZeroDivisionError

    with Run(tmp_path, Mirror(MemoryStorage(), keep=keep.Keep(broken))) as run:
        run.save(1)
        run.told.wait_for(MirrorErred)
    assert steps(LocalStorage(tmp_path)) == [1]


def test_closing_waits_no_longer_than_it_was_told(tmp_path: Path) -> None:
    """A mirror that hangs holds nobody up; what had begun is dropped, and nothing partial is listed."""
    mirror = Flaky()
    mirror.gate.clear()
    run = Run(tmp_path, Mirror(mirror, close_timeout=0.05))
    run.save(1)
    assert mirror.at_gate.wait(WAIT_S)
    threading.Timer(0.3, mirror.gate.set).start()
    run.manager.close()
    assert mirror.gate.is_set(), "it was joined"
    assert steps(mirror) == []


def test_after_a_notice_nobody_waits(tmp_path: Path) -> None:
    """A preempted process has seconds: the next run catches up."""
    mirror = Flaky()
    mirror.gate.clear()
    run = Run(tmp_path, mirror)
    run.manager.maybe_save(0)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(SystemExit):
        run.manager.maybe_save(1)
    assert mirror.at_gate.wait(WAIT_S)
    threading.Timer(0.2, mirror.gate.set).start()
    run.manager.close()
    assert steps(mirror) == []
    assert steps(LocalStorage(tmp_path)) == [1]


def test_a_manager_that_nobody_refers_to_takes_its_thread_along(tmp_path: Path) -> None:
    """The thread does not keep it alive."""
    run = Run(tmp_path, MemoryStorage())
    run.save(1)
    run.told.wait_for(Mirrored)
    reference = weakref.ref(run.manager)
    run.manager.hooks = ()  # type: ignore[attr-defined]
    run.manager = None  # type: ignore[assignment]
    gc.collect()
    assert reference() is None


def test_a_hook_may_not_close_its_manager(tmp_path: Path) -> None:
    """It would wait for itself: refused, logged, and the mirror goes on."""
    managers: list[CheckpointManager] = []
    raised: list[BaseException] = []
    was_told = threading.Event()

    def close(event: Event) -> None:
        if isinstance(event, Mirrored):
            try:
                managers[0].close()
            except RuntimeError as error:
                raised.append(error)
            was_told.set()

    mirror = MemoryStorage()
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, mirror=mirror, hooks=[close]) as manager:
        managers.append(manager)
        manager.save(1, block=True)
        assert was_told.wait(WAIT_S)
    assert len(raised) == 1
    assert steps(mirror) == [1]


# races and kills


def test_what_the_root_drops_meanwhile_is_left(tmp_path: Path) -> None:
    """Its files vanish while they are copied: no error, and the next newest is copied."""
    mirror = Flaky()
    with Run(tmp_path, mirror, keep=keep.last(1)) as run:
        mirror.gate.clear()
        run.save(1)
        assert mirror.at_gate.wait(WAIT_S)
        run.save(2)
        mirror.gate.set()
        run.told.wait_for(Mirrored)
    assert run.told.of(MirrorErred) == []
    assert steps(mirror) == [2]
    assert_intact(mirror)


def test_a_damaged_one_is_told_and_left(tmp_path: Path) -> None:
    """It is never copied, the others are."""
    with Run(tmp_path / "root", None) as run:
        for step in (1, 2):
            run.save(step)
    flip(tmp_path / "root", 2)
    mirror = MemoryStorage()
    with Run(tmp_path / "root", mirror) as run:
        run.save(3)
        run.told.wait_for(Mirrored, 2)
    assert steps(mirror) == [1, 3]
    (event,) = run.told.of(MirrorErred)
    assert isinstance(event, MirrorErred)
    assert isinstance(event.error, IntegrityError)
    assert (event.step, event.retry_s) == (2, None)


def test_a_second_manager_takes_both_over(tmp_path: Path) -> None:
    """As a notebook cell that was run twice: the first one's mirror ends, the second one's goes on."""
    mirror = MemoryStorage()
    first = Run(tmp_path, mirror)
    first.save(1)
    first.told.wait_for(Mirrored)
    with Run(tmp_path, mirror) as second:
        second.save(2)
        second.told.wait_for(Mirrored)
    first.manager.close()
    assert steps(mirror) == [1, 2]
    assert first.told.of(MirrorErred) == []


@pytest.mark.parametrize("at", [1, 8, 15, 22, 29, 36])
def test_killed_in_the_middle_of_a_copy(scratch: Path, at: int) -> None:
    """The root is as it should be, nothing partial is listed at the mirror, and the next run catches up."""
    root, mirror = scratch / "root", scratch / "mirror"
    child = os.fork()
    if child == 0:
        try:
            run = Run(root, LocalStorage(mirror, system=FaultySystem(sigkill(at))))
            for step in (1, 2):
                run.save(step)
            run.told.wait_for(Mirrored, 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert_intact(LocalStorage(root))
    assert_intact(LocalStorage(mirror))
    with Run(root, mirror) as run:
        run.restore()
        run.save(3)
        saved = steps(LocalStorage(root))
        run.told.wait(lambda: steps(LocalStorage(mirror)) == saved)
    assert_intact(LocalStorage(mirror))


# restoring


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """A root with steps 2 and 3, and its mirror with 1, 2 and 3."""
    root, mirror = tmp_path / "root", tmp_path / "mirror"
    with Run(root, mirror, keep=keep.last(2)) as run:
        for step in (1, 2, 3):
            run.save(step, metrics={"loss": step})
            run.told.wait_for(Mirrored, step)
    return root, mirror


def url_of(run: Run) -> Path:
    assert run.found is not None
    return Path(run.found.url).parent


def test_an_intact_root_is_restored_from_itself(both: tuple[Path, Path]) -> None:
    """The mirror is looked at, and not read."""
    root, mirror = both
    shutil.rmtree(next(mirror.glob("step-000000000003.*")))
    with Run(root, mirror) as run:
        assert run.restore() == 3
        assert url_of(run) == root


def test_a_wiped_root_is_restored_from_the_mirror(both: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Straight from there; then training goes on in a new root, which is mirrored too."""
    root, mirror = both
    shutil.rmtree(root)
    caplog.set_level("INFO", "ckptman")
    with Run(root, mirror) as run:
        assert run.restore() == 3
        assert url_of(run) == mirror
        assert f"restored step 3 from {mirror}" in caplog.text
        assert not root.exists(), "nothing was copied"
        (event,) = run.told.of(Restored)
        assert isinstance(event, Restored)
        assert event.checkpoint == run.found
        run.save(4)
        run.told.wait_for(Mirrored)
        assert run.restore() == 4
        assert url_of(run) == root
    assert steps(LocalStorage(mirror)) == [1, 2, 3, 4]


def test_a_wiped_root_that_was_only_taken_over(both: tuple[Path, Path]) -> None:
    """Killed before its first save: the mirror is still what there is."""
    from ckptman.repository.ownership import take

    root, mirror = both
    shutil.rmtree(root)
    take(LocalStorage(root), timeout_s=0).release()
    with Run(root, mirror) as run:
        assert run.restore() == 3


def test_a_damaged_newest_is_restored_from_the_mirror(both: tuple[Path, Path]) -> None:
    """Its copy is nearer than an older one; the damage is told. By its step too."""
    root, mirror = both
    flip(root, 3)
    for which in ("latest", 3):
        with Run(root, mirror) as run:
            with pytest.warns(DamagedCheckpointWarning, match="step 3"):
                assert run.restore(which) == 3
            assert url_of(run) == mirror
            assert [one.step for one in run.found.skipped] == [3]  # type: ignore[union-attr]


def test_where_both_are_damaged_an_older_one_is_taken(both: tuple[Path, Path]) -> None:
    """From the root first; then the copy of that; then what only the mirror still has; then it raises."""
    root, mirror = both
    expected = [(root, 2), (mirror, 2), (mirror, 1)]
    for path, step in [(root, 3), (mirror, 3), (root, 2), (mirror, 2), (mirror, 1)]:
        flip(path, step)
        if path == root and step == 3:
            continue
        with Run(root, mirror) as run, warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedCheckpointWarning)
            if not expected:
                with pytest.raises(IntegrityError, match="all 5 checkpoints"):
                    run.restore()
                break
            assert (run.restore(), url_of(run)) == (expected[0][1], expected[0][0])
            expected.pop(0)
    assert expected == []


def test_a_newest_record_that_was_lost(both: tuple[Path, Path]) -> None:
    """A root that was put back from an old backup knows less than its mirror."""
    root, mirror = both
    backup = root.with_name("backup")
    shutil.copytree(root, backup)
    with Run(root, mirror) as run:
        run.save(9)
        run.told.wait_for(Mirrored)
    shutil.rmtree(root)
    backup.rename(root)
    with Run(root, mirror) as run:
        assert run.restore() == 9
        assert url_of(run) == mirror


def test_what_was_deleted_does_not_come_back(both: tuple[Path, Path]) -> None:
    """A person who deletes a checkpoint that went wrong is not given it again by the mirror; by its step, it is."""
    root, mirror = both
    with Run(root, None) as run:
        run.manager.delete(3)
    with Run(root, mirror) as run:
        assert run.restore() == 2
        assert url_of(run) == root
        assert run.restore(3) == 3


def test_what_was_deleted_by_a_clock_set_back_does_not_come_back(both: tuple[Path, Path]) -> None:
    """Nor after more was changed by that clock: the catalog's own time never goes back."""
    root, mirror = both

    def change(what: str, steps: set[int], clock: Callable[[], datetime]) -> None:
        def left(entries: tuple[Entry, ...]) -> list[Entry]:
            return [entry for entry in entries if entry.step not in steps]

        take(LocalStorage(root), timeout_s=0, change=left, what=what, clock=clock).release()

    for what, steps in (("delete step 3", {3}), ("tag step 2", set[int]())):
        change(what, steps, lambda: datetime.now(UTC) - timedelta(days=1))
        with Run(root, mirror) as run:
            assert run.restore() == 2
            assert url_of(run) == root


def test_what_the_root_dropped_is_found_at_the_mirror(both: tuple[Path, Path]) -> None:
    """By step and by metric; where the root has one, it is that."""
    root, mirror = both
    with Run(root, mirror) as run:
        assert run.restore(1) == 1
        assert url_of(run) == mirror
        assert run.restore("best:loss") == 2
        assert url_of(run) == root
        with pytest.raises(CheckpointNotFound):
            run.restore(7)


def test_an_unreachable_mirror_at_a_restore(tmp_path: Path) -> None:
    """Told, where the root has checkpoints; an error where it has none: a run never starts afresh in silence."""
    mirror = Flaky()
    mirror.is_down = True
    with Run(tmp_path, mirror) as run:
        with pytest.raises(StorageError, match="start afresh"):
            run.restore()
        run.save(1)
        assert run.restore() == 1
        assert any(event.step is None for event in run.told.of(MirrorErred))  # type: ignore[attr-defined]


def test_the_first_run_has_neither(tmp_path: Path) -> None:
    """None, and nothing is made."""
    with Run(tmp_path / "root", tmp_path / "mirror") as run:
        assert run.restore() is None
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_borrowed_from_the_mirror(tmp_path: Path) -> None:
    """What was restored from there is written anew: its files are out of reach for the root."""
    frozen = torch.rand(1 << 20)
    with CheckpointManager(tmp_path / "root", {"f": frozen}, mirror=tmp_path / "mirror") as manager:
        manager.save(1, block=True)
    shutil.rmtree(tmp_path / "root")
    with CheckpointManager(tmp_path / "root", {"f": frozen}, mirror=tmp_path / "mirror") as manager:
        manager.restore()
        saved = manager.save(2, block=True).result()
        assert saved.new_nbytes == saved.nbytes
    assert_intact(LocalStorage(tmp_path / "root"))
    assert_intact(LocalStorage(tmp_path / "mirror"))


# arguments


def test_wrong_arguments(tmp_path: Path) -> None:
    """Told before anything is read or written."""
    state = {"x": torch.ones(1)}
    with pytest.raises(ValueError, match="mirror of itself"):
        CheckpointManager(tmp_path / "a", state, mirror=tmp_path / "a")
    with pytest.raises(ValueError, match="opened for reading"):
        CheckpointManager(tmp_path / "a", mirror=tmp_path / "b")
    with pytest.raises(TypeError, match="keep must be a rule"):
        Mirror(tmp_path, keep=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="close_timeout"):
        Mirror(tmp_path, close_timeout=-1.0)
    with pytest.raises(ValueError, match="cannot be opened"):
        CheckpointManager(tmp_path / "a", state, mirror="weird://x")
    assert list(tmp_path.iterdir()) == []


def test_no_mirror_shows_what_is_secret() -> None:
    """Neither of a URL nor of the options: people log what they give to a manager."""
    shown = repr(Mirror("s3://me:hush-1@bucket/run", storage_options={"secret": "hush-2"}))
    assert "hush" not in shown
    assert "bucket/run" in shown
