"""A reader that looks at a new root in the moment in which its first checkpoint comes."""

from __future__ import annotations

import pytest
import torch

from ckptman import CheckpointManager
from ckptman.errors import FormatError
from ckptman.format.names import CATALOG
from ckptman.repository.repository import Repository
from ckptman.storage.memory import MemoryStorage


class Meeting(MemoryStorage):
    """Its first checkpoint is saved after a reader has listed the empty catalog, and before it looks for attempts."""

    is_read = False

    def folders(self) -> list[str]:
        if self.is_read:
            self.is_read = False
            with CheckpointManager(self, {"w": torch.ones(2)}, rng=False) as manager:
                manager.save(1, block=True)
        return super().folders()


def test_a_root_is_not_called_damaged_because_its_first_checkpoint_just_came() -> None:
    storage = Meeting("first-checkpoint")
    storage.is_read = True
    assert [entry.step for entry in Repository(storage).entries()] == [1]


def test_a_root_that_lost_its_catalog_is_called_damaged() -> None:
    storage = MemoryStorage("lost-catalog")
    with CheckpointManager(storage, {"w": torch.ones(2)}, rng=False) as manager:
        manager.save(1, block=True)
    storage.delete([stored.key for stored in storage.listing(CATALOG)])
    with pytest.raises(FormatError, match="no readable catalog record"):
        Repository(storage).entries()
