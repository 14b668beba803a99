"""What ranks tell each other of a failure arrives, whatever its text holds."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ckptman import CheckpointManager
from ckptman.coordinator import FilesCoordinator
from ckptman.errors import CkptmanError, RankLost, StorageError, UnsupportedState
from ckptman.pipeline.budget import Limits
from ckptman.pipeline.engine import Engine
from ckptman.pipeline.ranks import Ranks
from ckptman.storage.memory import MemoryStorage

SURROGATE = "a file \udcff of another time"
"""As Python gives back names of files that are no UTF-8."""


def on_two_ranks(work: Callable[[FilesCoordinator], object]) -> list[BaseException | None]:
    """What *work* raised on each of two ranks, which are threads here."""
    job = secrets.token_hex(4)

    def one(rank: int) -> BaseException | None:
        with FilesCoordinator(f"memory://{job}", rank=rank, world_size=2, job=job, patience_s=5) as ranks:
            try:
                work(ranks)
            except Exception as error:  # noqa: BLE001 - it is what the test looks at
                return error
            return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


@pytest.mark.parametrize("guilty", [0, 1])
def test_an_error_that_quotes_what_utf_8_has_not_reaches_all(guilty: int) -> None:
    """Otherwise whoever met it left, and the others waited half an hour for it."""

    def work(coordinator: FilesCoordinator) -> None:
        def part() -> bytes:
            if coordinator.rank == guilty:
                raise UnsupportedState(SURROGATE, path=SURROGATE)
            return b""

        Ranks(coordinator).conclude(part)

    for error in on_two_ranks(work):
        assert type(error) is UnsupportedState
        assert r"a file \udcff" in str(error)
        assert error.path == r"a file \udcff of another time"


def test_a_rank_that_leaves_with_such_an_error_is_named() -> None:
    """In the middle of what all do together."""

    def work(coordinator: FilesCoordinator) -> None:
        if coordinator.rank:
            with coordinator._operation():
                raise StorageError(SURROGATE)
        coordinator.gather(b"")

    zero, one = on_two_ranks(work)
    assert type(zero) is RankLost
    assert "left what all ranks do together" in str(zero)
    assert type(one) is StorageError


def test_an_argument_that_is_wrong_on_one_rank_fails_the_save_on_all() -> None:
    """The other one does not wait for it, and the next save works."""

    def work(coordinator: FilesCoordinator) -> None:
        root = MemoryStorage("unused") if coordinator.rank else storage
        with CheckpointManager(root, {"w": torch.ones(2)}, coordinator=coordinator, rng=False) as manager:
            wrong = {"loss": object()} if coordinator.rank else {"loss": 1.0}
            manager.save(1, metrics=wrong, block=True)  # type: ignore[arg-type]

    storage = MemoryStorage("a")
    zero, one = on_two_ranks(work)
    assert isinstance(zero, CkptmanError)
    assert "must be one number" in str(zero)
    assert "on rank 1" in str(zero)
    assert isinstance(one, TypeError)


def test_several_saves_in_flight_from_several_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="with 2 ranks one save"):
        Engine({}, Limits(in_flight=2), overlap=False, ranks=2)
    Engine({}, Limits(in_flight=2), overlap=False, ranks=1)
