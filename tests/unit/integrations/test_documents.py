"""Documents: what a framework hands over comes back equal; names, and when what they stood for is deleted."""

import errno
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from ckptman import CheckpointManager, CkptmanError, FormatError, UnsupportedState
from ckptman.integrations.documents import Documents, Part, Weights, put_together, read, take_apart
from ckptman.integrations.files import tag_of
from ckptman.storage.local import LocalStorage
from ckptman.testing.faults import FaultySystem, fail


def document(step: int = 0) -> dict:
    """What Lightning makes, and some that is odder."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    weight = torch.arange(3.0) + step
    return {
        "epoch": step,
        "state_dict": module.state_dict(),
        "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": 3}}}},
        "optimizer_states": [{"state": {0: {"exp_avg": weight}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
        "EMA": {"tied": weight, "again": weight},
        "ema": {"differs only by case": torch.zeros(1)},
        "document": {"the name is taken": 1},
        "no/component": [1, float("inf")],
        "empty": {},
        7: {"no": "name"},
        "tensor": torch.ones(2, dtype=torch.bfloat16),
    }


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        same_items = type(one) is type(other) and list(one) == list(other)
        return same_items and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def documents(storage: object) -> Documents:
    return Documents(storage, names={"state_dict": "model"})


def test_a_document_comes_back_equal(tmp_path: Path) -> None:
    """Values, types, dtypes and orders, the versions of modules among them, whatever the keys are called."""
    given = document()
    shelf = documents(str(tmp_path))
    shelf.save(given, 3)
    shelf.close()
    entry, found = read(str(tmp_path))
    assert entry.step == 3
    assert equal(found, given)
    assert isinstance(found["state_dict"], OrderedDict)
    assert found["state_dict"]._metadata == given["state_dict"]._metadata
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with CheckpointManager(tmp_path, {"model": module}, rng=False) as manager:
        manager.restore(only=["model"])
    assert equal(module.state_dict(), given["state_dict"])


def test_components_are_found_by_the_shape_of_an_entry() -> None:
    """A flat dict of tensors is weights; what cannot have a file of its own is kept with the rest."""
    parts = take_apart(document(), {"state_dict": "model"})
    assert {name: type(part) for name, part in parts.items()} == {
        "model": Weights,
        "loops": Part,
        "optimizer_states": Part,
        "EMA": Weights,
        "document": Part,
    }


def test_a_checkpoint_of_another_kind_is_no_document(tmp_path: Path) -> None:
    """What a manager saved is refused, not guessed at."""
    with CheckpointManager(tmp_path, {"model": torch.nn.Linear(2, 2)}) as manager:
        manager.save(1, block=True)
    with pytest.raises(FormatError, match="was not saved by a framework"):
        read(str(tmp_path))
    with pytest.raises(FormatError):
        put_together({"document": {"order": []}})


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    """The path leads to the value, and nothing was saved."""
    with pytest.raises(UnsupportedState, match=r"callbacks\['timer'\]\['clock'\]"):
        documents(str(tmp_path)).save({"callbacks": {"timer": {"clock": object()}}}, 1)
    assert CheckpointManager(tmp_path).checkpoints() == []


def test_a_name_that_moves_lets_the_older_one_go(tmp_path: Path) -> None:
    """As when a file is overwritten; but what has another name stays, and so does the user's own tag."""
    shelf = documents(str(tmp_path))
    for step in range(4):
        shelf.save(document(step), step, tags=["last", *(["best"] if step == 1 else [])])
    assert [one.step for one in CheckpointManager(tmp_path).checkpoints()] == [1, 3]
    shelf.save(document(4), 4, tags=["last", "best"])
    shelf.save(document(5), 5, tags=["last"])
    shelf.drop("best")
    shelf.close()
    assert [one.step for one in CheckpointManager(tmp_path).checkpoints()] == [5]


def test_nothing_is_dropped_for_one_that_failed(tmp_path: Path) -> None:
    """A removal asked for while its replacement is being written does not happen if that fails."""
    clean = FaultySystem()
    shelf = documents(LocalStorage(tmp_path / "clean", system=clean))
    shelf.save(document(), 1, tags=["a"])
    first = len(clean.calls)
    shelf.close()
    faulty = FaultySystem(fail(first + 4, errno.ENOSPC))
    shelf = documents(LocalStorage(tmp_path / "full", system=faulty))
    shelf.save(document(), 1, tags=["a"])
    with pytest.raises(CkptmanError):
        shelf.save(document(2), 2, tags=["b"], block=False)
        shelf.drop("a")
    assert [one.step for one in CheckpointManager(tmp_path / "full").checkpoints()] == [1]


@pytest.mark.parametrize("name", ["last.ckpt", "epoch=1-step=2.ckpt", "7", "latest", "ä.pt", "x" * 100, "=", "a b"])
def test_every_file_name_has_a_tag_of_its_own(name: str) -> None:
    """A name that can be a tag is one; others get a likeness with a digest, so that no two are confused."""
    assert tag_of(name) == tag_of(name)
    assert (tag_of(name) == name) == (name == "last.ckpt")
    assert tag_of(name) not in {tag_of(name.replace("=", "-") + "-"), tag_of(name + "=")}
