"""Accidents that a reviewer thought of: each is a sequence that once lost, hung or hid something."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptman import CheckpointManager, CommitUnknown, Fenced, LockTimeout, Preempted, SaveFailed, StorageError, keep
from ckptman.events import Committed, Event
from ckptman.repository.file_lock import RootLock
from ckptman.repository.keep import Keep
from ckptman.repository.repair import repair
from ckptman.storage.base import Buffer, NewFile, Stored
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage


class Slow(MemoryStorage):
    """Holds data files back until it is opened."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.open = threading.Event()

    def open_new(self, key: str) -> NewFile:
        assert self.open.wait(30)
        return super().open_new(key)


class BlindAfterPut(MemoryStorage):
    """Cannot list the catalog once, right after a record was put."""

    is_armed = False
    is_blind = False

    def create(self, key: str, data: Buffer) -> None:
        super().create(key, data)
        self.is_blind = self.is_armed and key.startswith("catalog/")

    def listing(self, folder: str) -> list[Stored]:
        if self.is_blind and folder == "catalog":
            self.is_blind = self.is_armed = False
            raise StorageError("cannot list")
        return super().listing(folder)


def test_a_record_that_was_put_is_never_reported_as_failed() -> None:
    """The put landed and the look back failed: CommitUnknown, and nothing of the listed checkpoint is deleted."""
    storage = BlindAfterPut()
    x = torch.ones(1)
    with CheckpointManager(storage, {"x": x}, keep=keep.last(1)) as manager:
        manager.save(1, block=True)
        storage.is_armed = True
        x.fill_(2)
        with pytest.raises(CommitUnknown, match="was put"):
            manager.save(2, block=True)
        x.zero_()
        assert manager.restore().step == 2  # type: ignore[union-attr]
        assert x.item() == 2


def test_ctrl_c_while_a_job_is_handed_over_mixes_nothing() -> None:
    """The job may be under way although save raised: the next save must not overwrite the memory that it writes."""
    storage = Slow()
    x = torch.ones(1000)
    manager = CheckpointManager(storage, {"x": x}, rng=False)
    storage.open.set()
    manager.save(0).result()
    storage.open.clear()
    executor = manager._background._executor
    assert executor is not None
    submit = executor.submit

    def interrupted(*args: Any) -> None:
        submit(*args)
        raise KeyboardInterrupt

    executor.submit = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        manager.save(1)
    executor.submit = submit  # type: ignore[method-assign]
    x.fill_(2)
    pending = manager.save(2)
    storage.open.set()
    pending.result(30)
    for step in (1, 2):
        manager.restore(step)
        assert torch.equal(x, torch.full((1000,), float(step)))
    manager.close()


def test_a_save_in_flight_at_exit_is_finished(tmp_path: Path) -> None:
    """A script that ends without close still gets its last checkpoint."""
    program = f"""
        import torch
        from ckptman import CheckpointManager
        manager = CheckpointManager({str(tmp_path)!r}, {{"a": torch.zeros(10_000_000), "b": torch.ones(1_000_000)}})
        manager.save(1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    latest = CheckpointManager(tmp_path).latest()
    assert latest is not None
    assert latest.step == 1


def test_a_failed_background_save_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """At exit nobody collects it, so the log must have it."""
    manager = CheckpointManager(MemoryStorage(), {"x": torch.ones(1)}, keep=Keep(lambda history: 1 / 0))  # type: ignore[arg-type, return-value]
    assert manager.save(1).exception() is not None
    assert "saving step 1" in caplog.text
    manager.close()


def _idle(is_ready: Any) -> None:
    is_ready.send(True)
    time.sleep(1000)


def test_forked_children_can_still_be_terminated(tmp_path: Path) -> None:
    """A child that inherited our handler dies of SIGTERM as it did before us."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
        manager.maybe_save(1)
        fork = multiprocessing.get_context("fork")
        ready, is_ready = fork.Pipe(duplex=False)
        child = fork.Process(target=_idle, args=(is_ready,), daemon=True)
        child.start()
        assert ready.recv()
        child.terminate()
        child.join(30)
        assert child.exitcode == -signal.SIGTERM


@pytest.mark.parametrize("how", ["in the wrong order", "off the main thread", "dropped"])
def test_no_signal_is_swallowed_once_nobody_listens(tmp_path: Path, how: str) -> None:
    """However the managers went away, SIGTERM ends the process again."""
    endings = {
        "in the wrong order": "a.maybe_save(1); b.maybe_save(1); a.close(); b.close()",
        "off the main thread": "a.maybe_save(1); t = threading.Thread(target=a.close); t.start(); t.join()",
        "dropped": "a.maybe_save(1); del a; gc.collect()",
    }
    program = f"""
        import gc, os, signal, threading, time, torch
        from ckptman import CheckpointManager
        a, b = (CheckpointManager(os.path.join({str(tmp_path)!r}, n), {{"x": torch.ones(1)}}) for n in "ab")
        {endings[how]}
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, timeout=60)
    assert done.returncode == -signal.SIGTERM


def flip_newest_record(root: Path) -> None:
    path = max((root / "catalog").glob("*.json"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def quietly(act: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        act()


def test_what_the_lost_record_had_dropped_does_not_come_back_as_a_phantom(tmp_path: Path) -> None:
    """The record below still lists the deleted checkpoint; its files are gone, so it is not adopted again."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
        for step, loss in ((1, 0.1), (2, 0.5), (3, 0.7)):
            manager.save(step, metrics={"loss": loss}, block=True)
        manager.delete(1)
    flip_newest_record(tmp_path)
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, keep=keep.best("loss", 1)) as manager:
        quietly(lambda: manager.save(4, metrics={"loss": 0.9}, block=True))
        assert [c.step for c in manager.checkpoints()] == [2, 4]
        assert manager.restore("best:loss").step == 2  # type: ignore[union-attr]


def test_tags_of_a_resaved_step_survive_the_loss_of_its_record(tmp_path: Path) -> None:
    """The record below has the tag, and the adopted attempt takes it over."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, keep=keep.last(1)) as manager:
        manager.save(1, tags=["release"], block=True)
        manager.save(2, block=True)
        manager.save(1, block=True)
    flip_newest_record(tmp_path)
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, keep=keep.last(1)) as manager:
        quietly(lambda: manager.save(5, block=True))
        manager.save(6, block=True)
        assert [(c.step, c.tags) for c in manager.checkpoints()] == [(1, ("release",)), (6, ())]


def test_a_hook_that_calls_its_manager_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    """It would wait for itself for ever; it gets an error instead, which is logged, and the save goes on."""
    calls: list[Callable[[CheckpointManager], object]] = [
        lambda m: m.tag(1, "a"),
        lambda m: m.wait(),
        lambda m: m.restore(),
        lambda m: m.save(2),
        lambda m: m.delete(1),
        lambda m: m.close(),
        lambda m: CheckpointManager(m._storage, {"x": torch.ones(1)}).save(3),
    ]
    managers: list[CheckpointManager] = []
    for call in calls:
        storage = MemoryStorage()

        def hook(event: Event, call: Callable[[CheckpointManager], object] = call) -> None:
            if isinstance(event, Committed):
                call(managers[-1])

        caplog.clear()
        manager = CheckpointManager(storage, {"x": torch.ones(1)}, hooks=[hook])
        managers.append(manager)
        assert manager.save(1).result(30).step == 1
        manager.close()
        assert "would wait for itself" in caplog.text


def test_a_forked_child_does_not_wait_for_its_parents_save() -> None:
    """The thread that writes lives in the parent only: the child is fenced at once."""
    storage = Slow()
    manager = CheckpointManager(storage, {"x": torch.ones(1)})
    pending = manager.save(1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            manager.wait()
            manager.save(2)
        except Fenced:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    storage.open.set()
    pending.result(30)
    manager.close()


def test_a_preemption_saves_although_an_earlier_save_failed(tmp_path: Path) -> None:
    """This is the last chance: the old failure is logged, the new save is made, the exit code is 75."""
    fails = [True]

    def rule(history: object) -> frozenset[int]:
        if fails:
            fails.clear()
            raise RuntimeError("once")
        return frozenset({1, 2, 3})

    with pytest.raises(Preempted), CheckpointManager(tmp_path, {"x": torch.ones(1)}, keep=Keep(rule)) as manager:
        manager.maybe_save(1)
        manager.save(1)
        manager._background.drain()
        os.kill(os.getpid(), signal.SIGTERM)
        manager.maybe_save(2)
    assert [c.step for c in CheckpointManager(tmp_path).checkpoints()] == [2]


def test_an_interrupted_take_over_leaves_the_first_owner_in_place(tmp_path: Path) -> None:
    """Ctrl-C while a second manager waits for the first: the root is not locked against ourselves."""
    x = {"x": torch.ones(1)}
    first = CheckpointManager(tmp_path, x)
    first.save(1, block=True)
    assert first._claim.held is not None
    drain = first._claim.held._on_succession

    def interrupted() -> None:
        raise KeyboardInterrupt

    first._claim.held._on_succession = interrupted
    second = CheckpointManager(tmp_path, x, lock_timeout=0)
    with pytest.raises(KeyboardInterrupt):
        second.save(2)
    first._claim.held._on_succession = drain
    second.save(2, block=True)
    second.close()
    first.close()


def test_a_rule_that_raises_fails_the_save_and_masks_nothing(tmp_path: Path) -> None:
    """SaveFailed with the rule's error as its cause, no files left, and the training's own error comes out."""
    rule = Keep(lambda history: 1 / 0)  # type: ignore[arg-type, return-value]
    manager = CheckpointManager(tmp_path, {"x": torch.ones(1)}, keep=rule)
    with pytest.raises(RuntimeError, match="training") as caught, manager:
        manager.save(1)
        raise RuntimeError("training failure")
    assert "keep rule" in caught.value.__notes__[0]
    assert list(tmp_path.glob("step-*")) == []


def test_a_partial_restore_does_not_clear_the_half_restored_state(tmp_path: Path) -> None:
    """What ``strict=False`` leaves out is still damaged, so saving stays refused."""
    a, b = torch.ones(4), torch.ones(4)
    with CheckpointManager(tmp_path, {"a": a}) as manager:
        manager.save(1, block=True)
    with CheckpointManager(tmp_path, {"a": a, "b": b}) as manager:
        manager.save(2, block=True)
        (path,) = tmp_path.glob("step-000000000002.*/b.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
        with pytest.raises(Exception, match="damaged"):
            manager.restore(2)
        quietly(lambda: manager.restore(1, strict=False))
        with pytest.raises(SaveFailed, match="half restored"):
            manager.save(3)


def test_repair_mends_the_marker_wherever_the_root_is(tmp_path: Path) -> None:
    """Also in a folder whose name is the word that tells a newer format."""
    root = tmp_path / "newer"
    with CheckpointManager(root, {"x": torch.ones(1)}) as manager:
        manager.save(1, block=True)
    whole = (root / "ckptman.json").read_bytes()
    (root / "ckptman.json").write_bytes(b"{")
    repair(LocalStorage(root), timeout_s=0)
    assert (root / "ckptman.json").read_bytes() == whole


def test_repair_touches_nothing_before_it_has_the_lock(tmp_path: Path) -> None:
    """While another process is the writer, a damaged marker stays as it is; afterwards it is mended."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
        manager.save(1, block=True)
    whole = (tmp_path / "ckptman.json").read_bytes()
    (tmp_path / "ckptman.json").write_bytes(b"{")
    holder = RootLock(tmp_path / "writer.lock")
    assert holder.acquire(0)
    with pytest.raises(LockTimeout):
        repair(LocalStorage(tmp_path), timeout_s=0)
    assert (tmp_path / "ckptman.json").read_bytes() == b"{"
    holder.release()
    repair(LocalStorage(tmp_path), timeout_s=0)
    assert (tmp_path / "ckptman.json").read_bytes() == whole
