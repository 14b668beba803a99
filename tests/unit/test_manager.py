"""`CheckpointManager`: what the contract promises, with small real training."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptman import (
    CheckpointManager,
    CheckpointNotFound,
    Every,
    Fenced,
    Preempted,
    SaveFailed,
    StateMismatch,
    UnsupportedState,
    keep,
)
from ckptman.events import BecameWriter, Committed, Event, Pruned, Restored, SaveErred, Staged
from ckptman.storage.base import NewFile
from ckptman.storage.local import LocalStorage
from ckptman.storage.memory import MemoryStorage


def training(outputs: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Dropout(), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, outputs)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "progress": {"losses": []}, "name": "run"}


def train_one(state: dict[str, Any]) -> float:
    noise = random.random() + float(np.random.rand())
    loss = state["model"](torch.randn(4, 8)).pow(2).mean() + noise
    state["optimizer"].zero_grad()
    loss.backward()
    state["optimizer"].step()
    state["scheduler"].step()
    state["progress"]["losses"].append(loss.item())
    return loss.item()


def fingerprint(state: dict[str, Any]) -> list[bytes]:
    tensors = [*state["model"].state_dict().values()]
    for moments in state["optimizer"].state.values():
        tensors += moments.values()
    return [t.detach().numpy().tobytes() for t in tensors]


class Gate(MemoryStorage):
    """Holds back the data files of a save until it is opened, or fails them."""

    def __init__(self) -> None:
        super().__init__("gate")
        self.open = threading.Event()
        self.error: OSError | None = None

    def open_new(self, key: str) -> NewFile:
        assert self.open.wait(30)
        if self.error is not None:
            from ckptman.errors import StorageError

            raise StorageError.from_os(self.error, "cannot write", key) from self.error
        return super().open_new(key)


@pytest.mark.parametrize("block", [False, True], ids=["behind", "block"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, block: bool) -> None:
    """Weights, moments, schedule, loss curve and all random streams go on as if nothing had happened."""
    control = training()
    with CheckpointManager(tmp_path, control) as manager:
        for _ in range(5):
            train_one(control)
        manager.save(5, block=block)
        for _ in range(5):
            train_one(control)
    random.seed(99)
    np.random.seed(99)
    resumed = training()
    losses = resumed["progress"]
    with CheckpointManager(tmp_path, resumed) as manager:
        found = manager.restore()
        assert found is not None
        assert found.step == 5
        assert found.values == {"name": "run"}
        assert resumed["progress"] is losses
        for _ in range(5):
            train_one(resumed)
    assert fingerprint(resumed) == fingerprint(control)
    assert resumed["progress"]["losses"] == control["progress"]["losses"]
    assert resumed["scheduler"].state_dict() == control["scheduler"].state_dict()


def test_saving_changes_nothing_in_the_run(tmp_path: Path) -> None:
    """A run that saves at every step, step 0 included, equals one that never saves."""
    results = []
    for saves in (False, True):
        state = training()
        random.seed(1)
        np.random.seed(1)
        with CheckpointManager(tmp_path / str(saves), state) as manager:
            if saves:
                manager.save(0)
            for step in range(6):
                train_one(state)
                if saves:
                    manager.save(step + 1, block=step % 2 == 0)
        results.append((fingerprint(state), state["progress"]["losses"]))
    assert results[0] == results[1]


def test_training_may_change_the_state_once_save_returned() -> None:
    """What is written is the state at the time of the call, however late the background thread gets to it."""
    storage = Gate()
    weight = torch.ones(1000)
    with CheckpointManager(storage, {"weight": weight}) as manager:
        pending = manager.save(1)
        weight.zero_()
        assert not pending.done()
        storage.open.set()
        assert pending.result(30).step == 1
        manager.restore()
    assert torch.equal(weight, torch.ones(1000))


def test_a_failed_save_surfaces_at_the_handle_the_next_save_or_close() -> None:
    """Somebody always hears of it, exactly once, with its cause; then saving goes on."""
    storage = Gate()
    storage.open.set()
    manager = CheckpointManager(storage, {"x": torch.ones(1)})
    manager.save(1).result()
    storage.error = OSError(28, "No space left on device")
    with pytest.raises(SaveFailed, match="step 2") as caught:
        manager.save(2).result()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == 28
    manager.save(3)
    with pytest.raises(SaveFailed, match="step 3"):
        manager.save(4)
    with pytest.raises(SaveFailed, match="step 5"):
        manager.save(5, block=True)
    manager.save(6)
    with pytest.raises(SaveFailed, match="step 6"):
        manager.wait()
    storage.error = None
    manager.save(7)
    assert [c.step for c in manager.checkpoints()][:1] == [1]
    manager.wait()
    storage.error = OSError(5, "I/O error")
    manager.save(8)
    with pytest.raises(SaveFailed, match="step 8"):
        manager.close()
    assert [c.step for c in CheckpointManager(storage).checkpoints()] == [1, 7]


def test_leaving_with_an_exception_drains_and_does_not_mask_it() -> None:
    """The user's error comes out; a failed last save is a note on it."""
    storage = Gate()
    with pytest.raises(ZeroDivisionError) as caught, CheckpointManager(storage, {"x": torch.ones(1)}) as manager:
        manager.save(1)
        storage.error = OSError(28, "full")
        storage.open.set()
        _ = 1 / 0
    assert "step 1" in caught.value.__notes__[0]


def test_keep_drops_in_the_same_commit_and_never_the_newest_or_tagged(tmp_path: Path) -> None:
    """The rule decides; tags and the newest overrule it; files of what was dropped are gone."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, keep=keep.best("loss", 1)) as manager:
        for step, loss in enumerate([3.0, 1.0, 2.0, 2.5], start=1):
            manager.save(step, metrics={"loss": loss}, tags=["first"] if step == 1 else [])
        manager.wait()
        assert [c.step for c in manager.checkpoints()] == [1, 2, 4]
        assert len(list(tmp_path.glob("step-*"))) == 3
        best = manager.best("loss")
        assert best is not None
        assert best.step == 2
        assert manager.best("loss", "max").step == 1  # type: ignore[union-attr]
        assert manager.best("accuracy") is None


def test_latest_is_the_last_commit_and_a_step_can_be_saved_again(tmp_path: Path) -> None:
    """After a rollback the branch that was chosen goes on; a step saved again is replaced, its tags stay."""
    x = torch.zeros(1)
    with CheckpointManager(tmp_path, {"x": x}) as manager:
        for step in (10, 20):
            x.fill_(step)
            manager.save(step, block=True)
        manager.tag(10, "good")
        x.fill_(11)
        manager.save(10, block=True)
        assert [c.step for c in manager.checkpoints()] == [20, 10]
        assert manager.latest().tags == ("good",)  # type: ignore[union-attr]
        assert manager.restore("good").step == 10  # type: ignore[union-attr]
        assert x.item() == 11
        assert manager.restore(20).step == 20  # type: ignore[union-attr]
        assert x.item() == 20
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_tags_move_and_deleting_is_final(tmp_path: Path) -> None:
    """A tag names one checkpoint; what is unknown raises; what was deleted is gone."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
        manager.save(1, tags=["a"])
        manager.save(2, tags=["a", "b"])
        manager.wait()
        assert [c.tags for c in manager.checkpoints()] == [(), ("a", "b")]
        manager.tag(1, "b")
        manager.untag(2, "a")
        assert [c.tags for c in manager.checkpoints()] == [("b",), ()]
        with pytest.raises(CheckpointNotFound, match="no tag"):
            manager.untag(1, "z")
        with pytest.raises(CheckpointNotFound, match="step 9"):
            manager.tag(9, "z")
        with pytest.raises(ValueError, match="tag"):
            manager.tag(1, "latest")
        manager.delete(1)
        with pytest.raises(CheckpointNotFound):
            manager.delete(1)
        with pytest.raises(CheckpointNotFound):
            manager.restore("b")
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_restore_finds_by_metric_and_says_what_there_is(tmp_path: Path) -> None:
    """``best:METRIC:MODE`` works with colons in the name; an empty root gives None for the latest only."""
    x = torch.zeros(1)
    with CheckpointManager(tmp_path, {"x": x}) as manager:
        assert manager.restore() is None
        assert manager.latest() is None
        with pytest.raises(CheckpointNotFound, match="no checkpoint"):
            manager.restore(3)
        for step, value in ((1, 0.5), (2, 0.25), (3, float("nan"))):
            x.fill_(step)
            manager.save(step, metrics={"eval:loss": value})
        manager.wait()
        assert manager.restore("best:eval:loss:min").step == 2  # type: ignore[union-attr]
        assert manager.restore("best:eval:loss:max").step == 1  # type: ignore[union-attr]
        assert manager.restore("best:eval:loss").step == 2  # type: ignore[union-attr]
        assert x.item() == 2
        with pytest.raises(CheckpointNotFound, match="eval:loss"):
            manager.restore("best:accuracy:max")
        with pytest.raises(TypeError):
            manager.restore(1.5)  # type: ignore[arg-type]


def test_a_mismatch_lists_everything_and_touches_nothing(tmp_path: Path) -> None:
    """Another model is refused before any byte of the live state changes."""
    with CheckpointManager(tmp_path, training()) as manager:
        manager.save(1, block=True)
    other = training(outputs=5)
    before = fingerprint(other)
    stream = torch.get_rng_state()
    with CheckpointManager(tmp_path, other) as manager, pytest.raises(StateMismatch) as caught:
        manager.restore()
    assert any("3.weight" in difference for difference in caught.value.differences)
    assert fingerprint(other) == before
    assert torch.equal(torch.get_rng_state(), stream)


def test_only_restores_what_was_asked_for(tmp_path: Path) -> None:
    """The other components and the random streams stay."""
    a, b = torch.ones(3), torch.ones(3)
    with CheckpointManager(tmp_path, {"a": a, "b": b}) as manager:
        manager.save(1, block=True)
        a.zero_()
        b.zero_()
        stream = torch.get_rng_state()
        torch.rand(1)
        manager.restore(only=("a",))
        assert a.sum() == 3
        assert b.sum() == 0
        assert not torch.equal(torch.get_rng_state(), stream)
        with pytest.raises(ValueError, match="names no component"):
            manager.restore(only=("c",))


def test_unsupported_state_is_refused_before_anything_is_written() -> None:
    """The path is named, and the root does not hold so much as an attempt."""
    storage = MemoryStorage("x")
    with CheckpointManager(storage, {"log": {"file": [1, open(os.devnull)]}}) as manager:
        with pytest.raises(UnsupportedState) as caught:
            manager.save(1)
        assert caught.value.path == "log['file'][1]"
    assert storage.folders() in ([], ["catalog"])


def test_maybe_save_follows_the_schedule(tmp_path: Path) -> None:
    """At multiples, and wherever a callable says so."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, save_every=Every(steps=3)) as manager:
        saved = [step for step in range(1, 10) if manager.maybe_save(step)]
    assert saved == [3, 6, 9]
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, save_every=lambda step, s: step == 5 and s >= 0) as manager:
        assert [step for step in range(10, 0, -1) if manager.maybe_save(step)] == [5]
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
        assert manager.maybe_save(1) is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_notice_saves_commits_and_exits_with_75(tmp_path: Path, name: str) -> None:
    """The handler only sets a flag and chains; the next maybe_save saves and raises; close puts handlers back."""
    number = getattr(signal, name)
    heard: list[int] = []
    before = signal.signal(number, lambda n, frame: heard.append(n))
    mine = signal.getsignal(number)
    try:
        with pytest.raises(Preempted) as caught, CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
            assert manager.maybe_save(1) is None
            os.kill(os.getpid(), number)
            manager.maybe_save(2)
        assert caught.value.code == 75
        assert heard == [number]
        assert signal.getsignal(number) is mine
        latest = CheckpointManager(tmp_path).latest()
        assert latest is not None
        assert (latest.step, latest.preempted) == (2, True)
    finally:
        signal.signal(number, before)


def test_a_second_manager_takes_over_and_fences_the_first(tmp_path: Path) -> None:
    """A notebook cell run twice: no waiting, the first is drained, its next save raises Fenced, again and again."""
    x = torch.ones(1)
    first = CheckpointManager(tmp_path, {"x": x})
    first.save(1)
    second = CheckpointManager(tmp_path, {"x": x}, lock_timeout=0)
    second.save(2, block=True)
    for _ in range(2):
        with pytest.raises(Fenced, match="another manager in this process"):
            first.save(3)
    first.close()
    second.save(4, block=True)
    assert [c.step for c in second.checkpoints()] == [1, 2, 4]
    second.close()


def test_a_dropped_manager_does_not_keep_its_state_alive(tmp_path: Path) -> None:
    """A manager that was overwritten without close can be collected, and its root taken over."""
    first: CheckpointManager | None = CheckpointManager(tmp_path, {"x": torch.ones(1)})
    assert first is not None
    first.save(1, block=True)
    reference = weakref.ref(first)
    first = None
    gc.collect()
    assert reference() is None
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, lock_timeout=0) as second:
        second.save(2, block=True)


def test_reading_takes_no_lock_and_writes_nothing(tmp_path: Path) -> None:
    """A manager without a state looks; it cannot change anything, nor does it create the root."""
    root = tmp_path / "root"
    reader = CheckpointManager(root)
    assert reader.checkpoints() == []
    assert not root.exists()
    with CheckpointManager(root, {"x": torch.ones(1)}) as manager:
        manager.save(1, block=True)
        assert [c.step for c in reader.checkpoints()] == [1]
        for forbidden in (lambda: reader.save(1), lambda: reader.tag(1, "a"), lambda: reader.delete(1), reader.restore):
            with pytest.raises(ValueError, match="opened for reading"):
                forbidden()


def test_a_closed_manager_says_so(tmp_path: Path) -> None:
    """Closing twice is fine; anything else is an error."""
    manager = CheckpointManager(tmp_path, {"x": torch.ones(1)})
    manager.close()
    manager.close()
    with pytest.raises(ValueError, match="closed"):
        manager.save(1)
    with pytest.raises(ValueError, match="closed"):
        manager.restore()


def test_events_tell_the_story(tmp_path: Path) -> None:
    """Hooks see each event in order; a hook that raises stops nothing."""
    story: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("a bad hook")

    with CheckpointManager(tmp_path, {"x": torch.ones(1)}, keep=keep.last(1), hooks=[broken, story.append]) as manager:
        manager.save(1).result()
        manager.save(2).result()
        manager.restore()
    assert [type(e) for e in story] == [BecameWriter, Staged, Committed, Staged, Committed, Pruned, Restored]
    assert story[-2].steps == (1,)  # type: ignore[attr-defined]
    storage = Gate()
    storage.open.set()
    storage.error = OSError(28, "full")
    with CheckpointManager(storage, {"x": torch.ones(1)}, hooks=[story.append]) as manager:
        assert manager.save(1).exception() is not None
    assert isinstance(story[-1], SaveErred)


def test_bad_arguments_are_refused_at_once(tmp_path: Path) -> None:
    """TypeError or ValueError before anything is read or written."""
    x = {"x": torch.ones(1)}
    bad: list[Any] = [
        lambda: CheckpointManager("", x),
        lambda: CheckpointManager("gs2://b/x", x),
        lambda: CheckpointManager(tmp_path, {"../x": 1}),
        lambda: CheckpointManager(tmp_path, {"nul": 1}),
        lambda: CheckpointManager(tmp_path, {"rng": 1}),
        lambda: CheckpointManager(tmp_path, {"A": 1, "a": 1}),
        lambda: CheckpointManager(tmp_path, [1]),  # type: ignore[arg-type]
        lambda: CheckpointManager(tmp_path, x, keep=3),  # type: ignore[arg-type]
        lambda: CheckpointManager(tmp_path, x, save_every=5),  # type: ignore[arg-type]
        lambda: CheckpointManager(tmp_path, x, lock_timeout=-1),
        lambda: CheckpointManager(tmp_path, x, hooks=[3]),  # type: ignore[list-item]
    ]
    manager = CheckpointManager(tmp_path, x)
    bad += [
        lambda: manager.save(-1),
        lambda: manager.save(2**63),
        lambda: manager.save(True),
        lambda: manager.save(1.0),  # type: ignore[arg-type]
        lambda: manager.save(1, metrics={"loss": "low"}),  # type: ignore[dict-item]
        lambda: manager.save(1, metrics={"": 1.0}),
        lambda: manager.save(1, tags=["a/b"]),
        lambda: manager.save(1, tags=["12"]),
        lambda: manager.save(1, tags="abc"),  # else the tags a, b and c
    ]
    for call in bad:
        with pytest.raises((TypeError, ValueError)):
            call()
    assert list(tmp_path.iterdir()) == []
    assert len(bad) == 20


def test_metrics_may_be_tensors_and_not_finite(tmp_path: Path) -> None:
    """Whatever has one number is a metric; NaN and infinities come back."""
    with CheckpointManager(tmp_path, {"x": torch.ones(1)}) as manager:
        manager.save(1, block=True, metrics={"a": torch.tensor(0.5), "b": np.float32(2), "c": 3, "d": float("inf")})
        latest = manager.latest()
    assert latest is not None
    assert latest.metrics == {"a": 0.5, "b": 2.0, "c": 3.0, "d": float("inf")}


def test_an_empty_state_and_plain_values_need_no_file(tmp_path: Path) -> None:
    """A checkpoint without tensors is its manifest."""
    with CheckpointManager(tmp_path, {"note": "hi", "n": 3}, rng=False) as manager:
        manager.save(1, block=True)
        assert manager.restore().values == {"note": "hi", "n": 3}  # type: ignore[union-attr]
    (attempt,) = tmp_path.glob("step-*")
    assert [p.name for p in attempt.iterdir()] == ["manifest.json"]


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    """Any tool can read the tensors under their own names."""
    from safetensors.torch import load_file

    state = training()
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(1, block=True)
    (path,) = tmp_path.glob("step-*/model.safetensors")
    loaded = load_file(path)
    assert loaded.keys() == state["model"].state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state["model"].state_dict().items())


def test_half_a_restore_is_never_saved(tmp_path: Path) -> None:
    """After damage in mid-read the manager refuses to save until a restore has succeeded."""
    x, y = torch.ones(10), torch.ones(10)
    with CheckpointManager(tmp_path, {"x": x, "y": y}, rng=False) as manager:
        manager.save(1, block=True)
        manager.save(2, block=True)
        (path,) = tmp_path.glob("step-000000000002.*/y.safetensors")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(Exception, match="damaged"):
            manager.restore(2)
        with pytest.raises(SaveFailed, match="half restored"):
            manager.save(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = manager.restore()
        assert found is not None
        assert [s.step for s in found.skipped] == [2]
        manager.save(3, block=True)


def test_relative_roots_stay_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later chdir does not move the root."""
    monkeypatch.chdir(tmp_path)
    with CheckpointManager("runs/a", {"x": torch.ones(1)}) as manager:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        manager.save(1, block=True)
    assert LocalStorage(tmp_path / "runs/a").folders() != []
