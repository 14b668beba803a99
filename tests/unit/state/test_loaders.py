from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from state_roundtrip import begin, frozen, load, save
from torch.utils.data import Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptman.errors import StateMismatch
from ckptman.state.capture import capture

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital'")

N = 11


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


class Counting(IterableDataset[int]):
    """A stream that knows where it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < N:
            self.at += 1
            yield self.at
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def make(kind: str, workers: int) -> StatefulDataLoader:
    more: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    if kind == "iterable":
        return StatefulDataLoader(Counting(), batch_size=2, **more)
    if kind == "own generator":
        return StatefulDataLoader(Numbers(), 2, shuffle=True, generator=torch.Generator().manual_seed(3), **more)
    if kind == "persistent":
        return StatefulDataLoader(Numbers(), 2, shuffle=True, persistent_workers=True, **more)
    return StatefulDataLoader(Numbers(), 2, shuffle=kind == "shuffled", **more)


class Training:
    """An epoch loop that can be left after any batch and entered again, as a resumed script enters it."""

    def __init__(self, loader: StatefulDataLoader) -> None:
        self.loader = loader
        self.iterator: Iterator[Any] | None = None

    def go(self, events: int) -> list[Any]:
        seen: list[Any] = []
        for _ in range(events):
            if self.iterator is None:
                self.iterator = iter(self.loader)
            try:
                seen.append((next(self.iterator).tolist(), float(torch.rand(()))))
            except StopIteration:
                self.iterator = None
                seen.append(("end of an epoch", float(torch.rand(()))))
        return seen


PER_EPOCH = 7  # six batches and the end

POINTS = [
    *(
        (kind, 0, after)
        for kind in ("shuffled", "plain", "iterable", "own generator")
        for after in (0, 1, 3, 6, 7, 9, 14)
    ),
    *((kind, 2, after) for kind in ("shuffled", "own generator", "persistent") for after in (0, 3, 7)),
    ("iterable", 2, 3),
]


def test_the_sweep_covers_starts_middles_and_ends_of_epochs() -> None:
    """As many points as are promised, with and without workers."""
    assert len(POINTS) == 38


@pytest.mark.parametrize(("kind", "workers", "after"), POINTS)
def test_data_and_random_numbers_go_on(kind: str, workers: int, after: int) -> None:
    """From a save on, a resumed run sees the batches and draws the numbers of the run that was not interrupted."""
    torch.manual_seed(0)
    training = Training(make(kind, workers))
    training.go(after)
    saved = save({"loader": training.loader}, rng=True)
    expected = training.go(2 * PER_EPOCH)

    torch.manual_seed(99)
    resumed = Training(make(kind, workers))
    load({"loader": resumed.loader}, saved, rng=True)
    assert resumed.go(2 * PER_EPOCH) == expected


@pytest.mark.parametrize("kind", ["shuffled", "own generator", "iterable"])
def test_a_capture_changes_nothing(kind: str) -> None:
    """A loader that was never iterated stays so: no iterator, no worker, no number drawn, the same data as without."""

    def start() -> Training:
        torch.manual_seed(0)
        return Training(make(kind, 2 if kind == "shuffled" else 0))

    expected = start().go(9)
    training = start()
    for _ in range(2):
        before = torch.get_rng_state()
        capture({"loader": training.loader}, rng=True)
        assert training.loader._iterator is None
        assert training.loader.next_iter_state is None
        assert torch.equal(torch.get_rng_state(), before)
    seen = training.go(4)
    capture({"loader": training.loader}, rng=True)
    assert seen + training.go(5) == expected


def test_a_loaded_loader_is_captured_as_it_is() -> None:
    """A state that the user loaded and nobody has iterated yet is passed on, and no iterator is made of it."""
    torch.manual_seed(0)
    first = Training(make("shuffled", 0))
    first.go(3)
    state = first.loader.state_dict()
    second, third = make("shuffled", 0), make("shuffled", 0)
    second.load_state_dict(state)
    saved = save({"loader": second})
    assert second._iterator is None
    load({"loader": third}, saved)
    assert third._iterator is None
    assert frozen([batch for batch, _ in Training(third).go(3)]) == frozen([batch for batch, _ in first.go(3)])


def test_going_back_to_the_start() -> None:
    """A loader in the middle of an epoch can be restored to a checkpoint from before its first batch."""
    torch.manual_seed(0)
    loader = make("own generator", 0)
    saved = save({"loader": loader}, rng=True)
    expected = Training(loader).go(9)
    load({"loader": loader}, saved, rng=True)
    assert Training(loader).go(9) == expected


def test_going_back_to_the_start_forgets_a_loaded_state() -> None:
    """A state that was loaded and never used does not survive the restore of a fresh loader."""
    torch.manual_seed(0)
    middle, fresh = make("plain", 0), make("plain", 0)
    Training(middle).go(3)
    saved = save({"loader": fresh}, rng=True)
    fresh.load_state_dict(middle.state_dict())
    load({"loader": fresh}, saved, rng=True)
    assert Training(fresh).go(1)[0][0] == [0, 1]


def test_a_loader_without_what_was_saved_is_a_difference() -> None:
    """A generator that only the checkpoint knows is named."""
    with pytest.raises(StateMismatch, match=r"sampler\.generator is there on one side only"):
        begin({"loader": make("plain", 0)}, save({"loader": make("shuffled", 0)}))
