"""Borrowing: unchanged tensors are pointed at, never by trust, and never from a checkpoint that may be damaged."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptman import CheckpointManager, keep
from ckptman.pipeline import borrowing
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.local import LocalStorage

MIB = 1 << 20


class Adapted(torch.nn.Module):
    """A frozen base of 8 MiB and a small trained part, as with LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(2048, 1024).requires_grad_(False)
        self.adapter = torch.nn.Linear(64, 64)


def lora() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return {"model": model, "optimizer": optimizer}


def train(state: dict[str, Any]) -> None:
    state["model"].adapter(torch.randn(4, 64)).square().mean().backward()
    state["optimizer"].step()
    state["optimizer"].zero_grad()


def is_intact(root: Path) -> bool:
    repository = Repository(LocalStorage(root))
    entries = repository.entries()
    assert entries
    return not any(verify(repository, entry) for entry in entries)


def weights(state: dict[str, Any]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in state["model"].state_dict().values()]


@pytest.mark.parametrize("block", [True, False])
def test_later_saves_write_what_changed(tmp_path: Path, block: bool) -> None:
    """From the second save on: at most 1.02 × the changed bytes, in files on the disk too. All restore exactly."""
    state = lora()
    changed = 3 * 4 * (64 * 64 + 64)
    seen = {}
    with CheckpointManager(tmp_path, state) as manager:
        for step in range(4):
            train(state)
            manager.save(step, block=block).result(30)
            seen[step] = weights(state)
        first, *later = manager.checkpoints()
    assert first.new_nbytes == first.nbytes > 8 * MIB
    for checkpoint in later:
        rng_and_steps = 20_000
        assert checkpoint.new_nbytes <= 1.02 * changed + rng_and_steps
        folder = Path(checkpoint.url)
        on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert on_disk <= 1.02 * changed + rng_and_steps + 4096
    assert is_intact(tmp_path)
    with CheckpointManager(tmp_path, state) as manager:
        for step, expected in seen.items():
            manager.restore(step)
            assert all(torch.equal(a, b) for a, b in zip(weights(state), expected, strict=True))


@pytest.mark.parametrize("how", ["in place", "data", "numpy"])
def test_a_frozen_tensor_that_changed_is_written(tmp_path: Path, how: str) -> None:
    """No flag is believed: a change that moves no version counter is found by the bytes."""
    state = lora()
    base = state["model"].base.weight
    with CheckpointManager(tmp_path, state) as manager:
        for step in range(3):
            train(state)
            manager.save(step, block=True)
        if how == "in place":
            with torch.no_grad():
                base[-1, -1] += 1
        elif how == "data":
            base.data[-1, -1] += 1
        else:
            base.detach().numpy()[-1, -1] += 1
        expected = weights(state)
        assert manager.save(3, block=True).result().new_nbytes > 8 * MIB
        train(state)
        assert manager.save(4, block=True).result().new_nbytes > 8 * MIB  # it counts as one that changes now
        assert manager.save(5, block=True).result().new_nbytes < MIB  # and was equal twice
        manager.restore(3)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), expected, strict=True))


def test_lent_files_outlive_their_checkpoint_and_go_with_the_last_borrower(tmp_path: Path) -> None:
    """keep.last(1) drops the lender: its base stays, the rest goes. A base that changes frees the old one."""
    state = lora()
    with CheckpointManager(tmp_path, state, keep=keep.last(1)) as manager:
        manager.save(0, block=True)
        for step in range(1, 5):
            train(state)
            manager.save(step, block=True)
        lender = next(tmp_path.glob("step-000000000000.*"))
        assert [file.name for file in lender.iterdir()] == ["model.safetensors"]
        assert len(list(tmp_path.glob("step-*"))) == 2
        assert is_intact(tmp_path)
        state["model"].base.weight.data.add_(1)
        manager.save(5, block=True)
        assert not lender.exists()
        assert len(list(tmp_path.glob("step-*"))) == 1
        assert is_intact(tmp_path)


def test_a_file_is_not_kept_for_the_sake_of_a_small_part(tmp_path: Path) -> None:
    """Where less than half of a file is unchanged it is written anew, so that a prune frees the old file."""
    state = {"all": {"steady": torch.randn(MIB), "moving": torch.randn(2 * MIB)}}
    with CheckpointManager(tmp_path, state, keep=keep.last(1)) as manager:
        for step in range(4):
            state["all"]["moving"].add_(1)
            checkpoint = manager.save(step, block=True).result()
            assert checkpoint.new_nbytes == checkpoint.nbytes
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_a_new_run_on_an_old_root_borrows_only_what_it_has_read(tmp_path: Path) -> None:
    """A manager borrows from what it restored; one that restored nothing, or only a part, trusts nothing else."""
    state = lora()
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(0, block=True)
    with CheckpointManager(tmp_path, state) as manager:
        assert manager.save(1, block=True).result().new_nbytes > 8 * MIB
    with CheckpointManager(tmp_path, state) as manager:
        manager.restore()
        assert manager.save(2, block=True).result().new_nbytes < MIB
    with CheckpointManager(tmp_path, state) as manager:
        manager.restore(only=("optimizer",))
        assert manager.save(3, block=True).result().new_nbytes > 8 * MIB


def test_damage_is_never_borrowed(tmp_path: Path) -> None:
    """The newest is damaged and passed over; the next save must not point at it, though the digests are equal."""
    state = lora()
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(0, block=True)
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(1, block=True)  # restored nothing, so it wrote a base of its own
    damaged = next(tmp_path.glob("step-000000000001.*/model.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    with CheckpointManager(tmp_path, state) as manager:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = manager.restore()
        assert found is not None
        assert found.step == 0
        manager.save(2, block=True)
        manager.delete(1)
    assert is_intact(tmp_path)


def test_a_lender_that_was_deleted_lends_nothing(tmp_path: Path) -> None:
    """delete() drops the checkpoint that would have lent: the next save writes everything."""
    state = lora()
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(0, block=True)
        manager.save(1, block=True)
        manager.delete(1)
        manager.save(2, block=True)
        manager.delete(0)
        assert is_intact(tmp_path)
        manager.delete(2)
        manager.save(3, block=True)
        assert is_intact(tmp_path)
        assert manager.checkpoints()[0].new_nbytes > 8 * MIB


def test_a_failed_save_changes_nothing_of_what_may_be_lent(tmp_path: Path) -> None:
    """The attempt folder of a save is made unwritable in mid-run: the save after it borrows from the last good one."""
    state = lora()
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(0, block=True)
        moved = tmp_path.with_name("elsewhere")
        shutil.move(tmp_path, moved)
        tmp_path.write_text("in the way")
        with pytest.raises(Exception, match="failed"):
            manager.save(1, block=True)
        tmp_path.unlink()
        shutil.move(moved, tmp_path)
        assert manager.save(2, block=True).result().new_nbytes < MIB
        assert is_intact(tmp_path)


def test_what_changed_too_much_to_borrow_is_borrowed_once_it_rests(tmp_path: Path) -> None:
    """Six of ten tensors change: all is written, though not all was looked at. At rest, everything is borrowed."""
    state = {"weights": {str(index): torch.full((1 << 18,), float(index)) for index in range(10)}}
    with CheckpointManager(tmp_path, state, rng=False) as manager:
        for step in range(1, 6):
            if step == 2:
                for index in range(6):
                    state["weights"][str(index)] += 1
            manager.save(step, block=True)
        written = [checkpoint.new_nbytes for checkpoint in manager.checkpoints()]
    assert written[:2] == [10 * MIB, 10 * MIB]
    assert written[-1] == 0
    assert is_intact(tmp_path)


def many(count: int = 2048) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {f"t{number}": torch.randn(256, generator=random) for number in range(count)}


def drawn_first(state: dict[str, torch.Tensor]) -> list[str]:
    """The names of those that a save hashes before all others."""
    return random.Random(len(state)).choices(list(state), [tensor.nbytes + 1 for tensor in state.values()], k=32)


def test_of_very_many_any_single_change_is_written(tmp_path: Path) -> None:
    """Wherever it is, drawn to be hashed first or not: no stale byte is pointed at, the others are not rewritten."""
    state = many()
    seen: dict[int, list[torch.Tensor]] = {}
    with CheckpointManager(tmp_path, {"many": state}, rng=False) as manager:
        manager.save(0, block=True)
        for step, name in enumerate(["t0", "t1", *drawn_first(state)[:3], "t1023", "t2047"], start=1):
            state[name].view(torch.uint8)[step] ^= 1
            saved = manager.save(step, block=True).result()
            assert 0 < saved.new_nbytes <= step * 1024  # those that changed once are expected to change again
            seen[step] = [tensor.clone() for tensor in state.values()]
        for step in (1, 4, 7):
            manager.restore(step)
            assert all(torch.equal(a, b) for a, b in zip(state.values(), seen[step], strict=True))


def test_of_very_many_it_takes_few_to_see_that_all_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is borrowed, and next to nothing hashed; as soon as most have not changed, they are borrowed."""
    state = many()
    hashed = []
    is_unchanged = borrowing._is_unchanged
    monkeypatch.setattr(borrowing, "_is_unchanged", lambda *one: hashed.append(one) or is_unchanged(*one))
    with CheckpointManager(tmp_path, {"many": state}, rng=False) as manager:
        for step in range(3):
            torch._foreach_add_(list(state.values()), 1.0)
            saved = manager.save(step, block=True).result()
            assert saved.new_nbytes == saved.nbytes
        assert 0 < len(hashed) <= 2 * 32
        assert hashed[0][0].data_ptr() == state[drawn_first(state)[0]].data_ptr()
        torch._foreach_add_(list(state.values())[:500], 1.0)
        saved = manager.save(3, block=True).result()
        assert saved.new_nbytes == 500 * 1024


def test_looking_at_a_few_first_leaves_the_programs_random_numbers_alone(tmp_path: Path) -> None:
    """A program that saves draws what it would have drawn."""
    state = many()
    random.seed(0)
    with CheckpointManager(tmp_path, {"many": state}, rng=False) as manager:
        for step in range(3):
            manager.save(step, block=True)
    drawn = random.random()
    random.seed(0)
    assert drawn == random.random()
