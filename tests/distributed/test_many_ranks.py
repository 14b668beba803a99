"""What ranks have of their own, what they agree upon, and what happens to all when one of them fails. Real ranks."""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fleet import run

from ckptman import CheckpointManager, CheckpointNotFound, CkptmanError, LockTimeout, StateMismatch
from ckptman.errors import StorageError
from ckptman.pipeline.sharing import Sharing
from ckptman.repository.repository import Repository
from ckptman.storage.local import LocalStorage


class Loader:
    """A loader as users write them; ``load_state_dicts`` only in `Spreading`."""

    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Spreading(Loader):
    def load_state_dicts(self, states: list[dict[str, int]]) -> None:
        self.position = sum(state["position"] for state in states)


def state_of(rank: int, kind: type[Loader] = Loader) -> dict[str, Any]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    torch.manual_seed(50 + rank)
    model(torch.randn(4, 8))  # running statistics of its own
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": kind(10 * rank),
        "generator": torch.Generator().manual_seed(rank),
        "mine": {"rank": rank, "table": torch.full((3,), float(rank))},
        "shared": {"ema": torch.arange(5.0)},
    }


def look(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "weight": state["model"][0].weight.tolist(),
        "mean": state["model"][1].running_mean.tolist(),
        "loader": state["loader"].position,
        "generator": torch.rand(2, generator=state["generator"]).tolist(),
        "mine": [state["mine"]["rank"], state["mine"]["table"].tolist()],
        "shared": state["shared"]["ema"].tolist(),
        "rng": torch.rand(2).tolist(),
    }


def _save_own(rank: int, root: str) -> dict[str, Any]:
    state = state_of(rank)
    with CheckpointManager(root, state) as manager:
        manager.save(1, block=True)
        if rank == 1:  # the plan serves again, and a rank that lost it, alone, gets one anew
            manager._starting.sharing = Sharing(manager._ranks)
        manager.save(2).result()
    return look(state)


def _restore_own(rank: int, root: str, kind: str, strict: bool, only: list[str] | None) -> dict[str, Any] | str:
    state = state_of(rank + 20, Spreading if kind == "spreading" else Loader)
    state["model"][0].weight.data.zero_()
    with CheckpointManager(root, state) as manager, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            manager.restore(only=only, strict=strict)
        except StateMismatch as error:
            return str(error)
    return {**look(state), "warnings": [str(one.message) for one in caught]}


def own(names: Iterable[str]) -> list[str]:
    """Those that single ranks have of their own."""
    return [name for name in names if ".rank-" in name]


def test_what_differs_between_ranks_comes_back_to_each(tmp_path: Path) -> None:
    """Random streams, loaders, generators, buffers, values. What is equal is stored once."""
    root = str(tmp_path / "root")
    saved = run(tmp_path, 3, _save_own, root)
    found = run(tmp_path, 3, _restore_own, root, "plain", True, None)
    assert [{**one, "warnings": None} for one in found] == [{**one, "warnings": None} for one in saved]
    repository = Repository(LocalStorage(root))
    manifest = repository.manifest(repository.entries()[-1])
    names = {tensor.name for tensor in manifest.tensors}
    assert {"mine/table", "mine.rank-00001/table", "mine.rank-00002/table", "model.rank-00002/1.running_mean"} <= names
    assert not any(
        name.startswith(("shared.rank", "optimizer.rank")) or name.endswith("/0.bias") for name in own(names)
    )
    assert {"loader.rank-00001", "mine.rank-00002"} <= set(own(manifest.components))
    assert not [name for name in own(manifest.components) if name.startswith(("model", "optimizer", "shared"))]
    assert repository.checkpoints()[-1].components == (*state_of(0), "rng")


def _drift(rank: int, root: str) -> list[list[float]]:
    """No data parallelism: each rank trains a model of its own, and all began with the same one."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Embedding(40, 64), torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    rows = torch.tensor([18 + rank, 20])  # in the middle of the table: what both begin and end with stays equal
    with CheckpointManager(root, {"model": model, "optimizer": optimizer}) as manager:
        for number in range(3):
            model(rows).square().sum().backward()
            if number:
                optimizer.step()
            optimizer.zero_grad()
            manager.save(number, block=True)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        moments = [{name: value.clone() for name, value in one.items()} for one in optimizer.state.values()]
        for parameter in model.parameters():
            parameter.data.zero_()
        manager.restore()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    for one, other in zip(moments, optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    return before[0][18:21].tolist()


def test_models_that_began_equal_and_drifted_apart_come_back_to_their_ranks(tmp_path: Path) -> None:
    """A plan that was made while all were equal does not serve on: no rank loses its weights to another's."""
    zero, one = run(tmp_path, 2, _drift, str(tmp_path / "root"))
    assert zero != one


def _pipeline(rank: int, root: str) -> dict[str, Any]:
    """Ranks 0 and 1 train the first stage together, rank 2 the second one: plain tensors under names of their own."""
    torch.manual_seed(3)
    stages = [torch.nn.Embedding(4000, 16), torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))]
    number = rank // 2
    model = torch.nn.ModuleDict({f"stage{number}": stages[number]})
    weight = next(model.parameters())
    found: dict[str, Any] = {}
    with CheckpointManager(root, {"model": model}, rng=False) as manager:
        sharing = manager._starting.sharing
        manager.save(1, block=True)
        plan = sharing._plan
        assert plan is not None
        found["groups"] = sorted(set(plan.groups))
        with torch.no_grad():
            weight.add_(1)  # as all who hold it do
        manager.save(2, block=True)
        found["plan serves on"] = sharing._plan is plan
        with torch.no_grad():
            weight.view(-1)[30_000:32_000] += rank  # in the middle: now 0 and 1 differ
        manager.save(3, block=True)
        before = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        manager.restore()
        found["restored"] = torch.equal(weight, before)
        found["middle"] = weight.view(-1)[30_000 % weight.numel()].item()
    return found


def test_stages_of_a_pipeline_are_compared_only_with_their_replicas(tmp_path: Path) -> None:
    """A plan serves on though no two stages hold the same; and drift between the replicas of one stage is seen."""
    root = str(tmp_path / "root")
    zero, one, two = run(tmp_path, 3, _pipeline, root)
    assert zero["groups"] == one["groups"] == [0]
    assert two["groups"] == [-1]
    for found in (zero, one, two):
        assert found["plan serves on"]
        assert found["restored"]
    assert zero["middle"] != one["middle"]
    repository = Repository(LocalStorage(root))
    names = {tensor.name for tensor in repository.manifest(repository.entries()[-1]).tensors}
    assert own(names) == ["model.rank-00001/stage0.weight"]


def test_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Streams are seeded anew, reproducibly; a loader is refused unless it can spread, or it is asked to be left."""
    root = str(tmp_path / "root")
    saved = run(tmp_path, 3, _save_own, root)
    refused = run(tmp_path, 2, _restore_own, root, "plain", True, None)
    assert refused[0] == refused[1]
    assert "loader: 3 ranks saved it, 2 restore it" in refused[0]
    assert "mine: 3 ranks saved it" in refused[0]
    left = run(tmp_path, 2, _restore_own, root, "plain", False, None)
    again = run(tmp_path, 2, _restore_own, root, "plain", False, None)
    assert left == again
    for rank, one in enumerate(left):
        assert (one["weight"], one["shared"]) == (saved[0]["weight"], saved[0]["shared"])
        assert one["mean"] == saved[0]["mean"]
        assert one["loader"] == 10 * (rank + 20)
        assert any("rng: 3 ranks saved it, 2 restore it; it is seeded anew" in text for text in one["warnings"])
    assert left[0]["rng"] != left[1]["rng"]
    assert left[0]["generator"] != left[1]["generator"]
    spread = run(tmp_path, 2, _restore_own, root, "spreading", False, None)
    assert [one["loader"] for one in spread] == [30, 30]
    (alone,) = run(tmp_path, 1, _restore_own, root, "plain", True, ["model", "optimizer"], group=False)
    assert alone["weight"] == saved[0]["weight"]


class Failing(LocalStorage):
    """A disk that is full, on the rank that is told so."""

    is_full = False

    def open_new(self, key: str) -> Any:
        if self.is_full and "safetensors" in key:
            raise StorageError(f"creating {key!r}: No space left on device", errno=errno.ENOSPC, key=key)
        return super().open_new(key)


def _text(call: Callable[[], object]) -> list[str]:
    try:
        call()
    except CkptmanError as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def _no_memory(*_: object, **__: object) -> Any:
    raise MemoryError("not a byte left")


def _fail_everywhere(rank: int, root: str) -> dict[str, Any]:
    storage, state = Failing(root), state_of(rank)
    found: dict[str, Any] = {}
    with CheckpointManager(storage, state) as manager:
        manager.save(1, block=True)
        storage.is_full = rank == 2
        found["full, blocking"] = _text(lambda: manager.save(2, block=True))
        pending = manager.save(3)
        found["full, behind"] = _text(pending.result)
        manager.save(4)
        found["full, collected by the next save"] = _text(lambda: manager.save(5))
        storage.is_full = False
        state["mine"]["bad"] = print if rank == 1 else 0
        found["unsupported"] = _text(lambda: manager.save(6))
        state["mine"]["bad"] = 0
        borrow = manager._engine._borrow
        manager._engine._borrow = _no_memory if rank == 3 else borrow
        found["no memory, behind"] = _text(lambda: manager.save(9).result())
        found["no memory, blocking"] = _text(lambda: manager.save(10, block=True))
        manager._engine._borrow = borrow
        manager._save_every = lambda step, seconds: True
        manager._restoring.half_restored = "as after a damaged one" if rank == 2 else None
        found["half restored"] = _text(lambda: manager.maybe_save(11))[0]
        manager._save_every = manager._restoring.half_restored = None
        found["other steps"] = _text(lambda: manager.save(7 + rank))
        found["keep"] = manager.save(8, block=True).result().step
        found["no such step"] = _text(lambda: manager.restore(99))
        found["steps"] = [checkpoint.step for checkpoint in manager.checkpoints()]
        manager.tag(8, "good")
        manager.delete(1)
        dist.barrier()
        found["left"] = [[checkpoint.step, list(checkpoint.tags)] for checkpoint in manager.checkpoints()]
    dist.barrier()
    return found


def test_a_failure_on_one_rank_is_the_same_on_all_and_training_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "root"
    first, *others = run(tmp_path, 4, _fail_everywhere, str(root))
    assert all(other == first for other in others)
    for name, step in (("full, blocking", 2), ("full, behind", 3), ("full, collected by the next save", 4)):
        kind, text = first[name]
        assert kind == "SaveFailed"
        assert text.startswith(f"saving step {step} failed, nothing was committed:")
        assert "No space left" in text
        assert "rank 2 of 4, host" in text
    for name in ("no memory, behind", "no memory, blocking"):
        assert first[name][0] == "SaveFailed"
        assert "not a byte left" in first[name][1]
        assert "rank 3 of 4" in first[name][1]
    assert first["unsupported"][0] == "UnsupportedState"
    assert "mine['bad']" in first["unsupported"][1]
    assert "rank 1 of 4" in first["unsupported"][1]
    assert first["half restored"] == "SaveFailed", "and nobody waits for the one who knew first"
    assert first["other steps"][0] == "SaveFailed"
    assert first["no such step"][0] == CheckpointNotFound.__name__
    assert first["steps"] == [1, 8]
    assert first["left"] == [[8, ["good"]]]
    assert len(list(root.glob("step-*"))) == 1, "what failed was removed"


def _damage_and_restore(rank: int, root: str) -> dict[str, Any]:
    state = state_of(rank)
    with CheckpointManager(root, state) as manager:
        for step in (1, 2, 3):
            state["mine"]["rank"] = 100 * step + rank
            manager.save(step, block=True)
        dist.barrier()
        if rank == 0:
            for step, name in ((3, "mine.rank-00002.safetensors"), (2, "manifest.json")):
                (path,) = Path(root).glob(f"step-00000000000{step}*/{name}")
                data = bytearray(path.read_bytes())
                data[-3] ^= 1
                path.write_bytes(data)
        dist.barrier()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = manager.restore()
        assert found is not None
        one = _text(lambda: manager.restore(3))
    return {
        "step": found.step,
        "rank": state["mine"]["rank"],
        "skipped": [[skip.step, skip.reason] for skip in found.skipped],
        "warnings": sorted({one.category.__name__ for one in caught}),
        "asked for": one,
    }


def test_damage_that_one_rank_finds_makes_all_walk_back_together(tmp_path: Path) -> None:
    found = run(tmp_path, 3, _damage_and_restore, str(tmp_path / "root"))
    for rank, one in enumerate(found):
        assert (one["step"], one["rank"]) == (1, 100 + rank)
        assert one["skipped"] == found[0]["skipped"]
        assert [step for step, _ in one["skipped"]] == [3, 2]
        assert "mine.rank-00002/table" in one["skipped"][0][1]
        assert one["warnings"] == ["DamagedCheckpointWarning"]
        assert one["asked for"][0] == "IntegrityError"


def _save_behind_training(rank: int, root: str, overlap: bool) -> list[float]:
    torch.manual_seed(1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with CheckpointManager(root, {"model": model, "optimizer": optimizer}, overlap=overlap) as manager:
        for step in range(50):
            loss = model(torch.randn(8, 64)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + rank) % 3 == 0:
                time.sleep(0.001)  # so that ranks are never at the same place
            manager.save(step)
    return [p.double().sum().item() for p in model.parameters()]


@pytest.mark.parametrize("overlap", [False, True], ids=["staged at once", "overlapping"])
def test_fifty_saves_behind_training_neither_hang_nor_change_anything(tmp_path: Path, overlap: bool) -> None:
    root = tmp_path / "root"
    found = run(tmp_path, 2, _save_behind_training, str(root), overlap)
    assert found[0] == found[1]
    model = torch.nn.Linear(64, 64)
    with CheckpointManager(root, {"model": model}, rng=False) as manager:
        assert len(manager.checkpoints()) == 50
        manager.restore(only=["model"])
    assert [p.double().sum().item() for p in model.parameters()] == found[0]


def _meet(rank: int, root: str) -> list[str]:
    with CheckpointManager(root, {"x": torch.zeros(2)}, lock_timeout=0.2) as manager:
        return _text(lambda: manager.save(5, block=True))


def test_a_second_job_on_the_root_is_told_so_on_all_ranks(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with CheckpointManager(root, {"x": torch.ones(2)}) as manager:
        manager.save(1, block=True)
        first, second = run(tmp_path, 2, _meet, str(root))
        assert first == second
        assert first[0] == LockTimeout.__name__
        assert manager.save(2, block=True).result().step == 2
