"""ignite: a run that is killed and started again by the same command ends as if nothing had happened."""

import errno
from pathlib import Path

import pytest
import torch
from killing import contents, differing, kill_and_resume

pytest.importorskip("ignite")

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint

from ckptman import CheckpointManager, CkptmanError
from ckptman.events import Committed
from ckptman.integrations.ignite import CkptmanSaver
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import FaultySystem, fail

COMPONENTS = ["model", "optimizer", "scheduler", "loader", "trainer", "losses", "checkpointer", "rng"]


@pytest.mark.timeout(300)
def test_a_killed_run_ends_bit_identical(tmp_path: Path) -> None:
    """Everything that was to be saved, killed at various points of a save, within and between epochs."""
    control, killed = kill_and_resume("ignite_run.py", tmp_path, [47, 99])
    assert contents(control, COMPONENTS)["step"] == 40
    assert differing(control, killed, COMPONENTS) == {47: [], 99: []}


def three_epochs(storage: LocalStorage, hooks: list) -> None:
    """A run that keeps one checkpoint, the newest."""
    weight = torch.zeros(4)
    trainer = Engine(lambda engine, batch: weight.add_(1))
    to_save = {"weight": torch.nn.Linear(2, 2), "trainer": trainer}
    with CkptmanSaver(storage, to_save, trainer, hooks=hooks) as saver:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, saver, n_saved=1))
        trainer.run([0], max_epochs=3)


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_deleted_before_what_replaces_it_is_committed(tmp_path: Path) -> None:
    """Whichever change of the disk is the first to fail for good, the newest checkpoint that was committed is there."""
    clean = FaultySystem()
    three_epochs(LocalStorage(tmp_path / "clean", system=clean), [])
    assert [one.step for one in CheckpointManager(tmp_path / "clean").checkpoints()] == [3]
    assert len(clean.calls) > 60
    survived = set()
    for at in range(1, len(clean.calls) + 1, 5):
        root, committed = tmp_path / str(at), []
        storage = LocalStorage(root, system=FaultySystem(fail(at, errno.ENOSPC, lasting=True)))
        try:
            three_epochs(storage, [lambda event, seen=committed: seen.append(event)])
        except CkptmanError:
            survived.add(at)
        steps = [event.checkpoint.step for event in committed if isinstance(event, Committed)]
        found = [one.step for one in CheckpointManager(root).checkpoints()] if steps else []
        assert set(steps[-1:]) <= set(found), f"the failure of change {at}"
    assert len(survived) > 10
