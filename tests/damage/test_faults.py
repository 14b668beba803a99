"""A medium that fails at any call of a save."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptman import CheckpointManager, SaveFailed
from ckptman.errors import CommitUnknown, StorageError
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import FaultySystem, Moment, fail

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES)


def state() -> dict[str, Any]:
    return {"weights": torch.arange(64.0), "moments": {"mean": torch.ones(16), "count": 1}}


def manager_of(root: Path, system: FaultySystem | None = None) -> CheckpointManager:
    return CheckpointManager(LocalStorage(root, system=system or FaultySystem()), state(), rng=False, lock_timeout=0)


def steps(root: Path) -> list[int]:
    """The steps that are listed; all of them are intact."""
    repository = Repository(LocalStorage(root))
    entries = repository.entries()
    assert [verify(repository, entry) for entry in entries] == [[]] * len(entries)
    return [entry.step for entry in entries]


@pytest.fixture
def template(scratch: Path) -> Path:
    with manager_of(scratch / "template") as manager:
        manager.save(1, block=True)
        manager.save(2, block=True)
    return scratch / "template"


def count_calls(template: Path) -> int:
    system = FaultySystem()
    root = shutil.copytree(template, template.with_name("counted"))
    with manager_of(root, system) as manager:
        manager.save(3, block=True)
    return len(system.calls)


def try_to_save(root: Path, manager: CheckpointManager) -> str:
    """Save step 3; the answer, which must be true."""
    failure: SaveFailed | CommitUnknown | None = None
    try:
        manager.save(3, block=True)
    except (SaveFailed, CommitUnknown) as error:
        failure = error
    if failure is None:
        assert steps(root) == [1, 2, 3]
        return "saved"
    assert isinstance(failure.__cause__, StorageError)
    if isinstance(failure, SaveFailed):
        assert failure.step == 3
        assert steps(root) == [1, 2]
    else:
        assert steps(root) in ([1, 2], [1, 2, 3])
    return type(failure).__name__


@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_call_that_fails_once(template: Path, number: int, moment: Moment) -> None:
    """
    Any one call fails, or works and answers that it failed: the save's answer is true, the earlier checkpoints are
    intact, and the same manager's next save works. "Unknown" is said only of a record that is visible, and whose
    folder could not be fsynced.
    """
    answers: Counter[str] = Counter()
    for at in range(1, count_calls(template) + 1):
        root = shutil.copytree(template, template.with_name("root"))
        system = FaultySystem(fail(at, number, moment=moment))
        manager = manager_of(root, system)
        answer = try_to_save(root, manager)
        call = system.calls[at - 1]
        if answer == "CommitUnknown":
            assert (call.name, Path(call.path).name) == ("fsync_dir", "catalog")
        if (call.name, Path(call.path).name) == ("link", "000000000005.json") and moment == "after":
            assert answer == "saved", "the answer was lost, but the record was there: its nonce tells"
        before = steps(root)
        manager.save(4, block=True)
        manager.close()
        assert steps(root) == [*before, 4]
        answers[answer] += 1
        shutil.rmtree(root)
    print(f"{errno.errorcode[number]} {moment}: {dict(answers)}")
    assert answers["SaveFailed"] >= 10
    assert answers["CommitUnknown"] == 2, "once for the record of the new writer, once for that of the save"


@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_a_medium_that_fails_from_some_call_on(template: Path, number: int) -> None:
    """Every later call fails too, those that clean up included: the answer is true, and another manager goes on."""
    answers: Counter[str] = Counter()
    for at in range(1, count_calls(template) + 1):
        root = shutil.copytree(template, template.with_name("root"))
        manager = manager_of(root, FaultySystem(fail(at, number, lasting=True)))
        answers[try_to_save(root, manager)] += 1
        manager.close()
        before = steps(root)
        with manager_of(root) as healthy:
            healthy.save(4, block=True)
        assert steps(root) == [*before, 4]
        shutil.rmtree(root)
    print(f"{errno.errorcode[number]} from then on: {dict(answers)}")
    assert answers["SaveFailed"] >= 10
    assert answers["saved"] >= 1
