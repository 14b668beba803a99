"""
ckptman: save, be killed, resume — bit for bit.

The house, from the ground up; a module imports only from floors below its own:

    7  guests     cli/ | demo/ | integrations/ | testing/
                  convert/, doctor/            what these share: other tools' formats; measuring a storage
    6  face       manager.py                   CheckpointManager; boundary.py, schedule.py | preemption.py: when to save
    5  motion     pipeline/                    stage → write, read → place
    4  torch      state/ | coordinator.py      live objects ↔ leaves; ranks
    3  rules      repository/ | plan/          what exists, and who may change it | which bytes go where
                  | coordination/              how ranks talk
    2  meaning    format/                      what bytes mean (pure)
    1  ground     storage/                     bytes by key
    0  words      events.py, above types.py | errors.py | warning.py

This module is the door. It imports nothing until a name is asked for, so that ``ckptman ls`` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptman.coordinator import Coordinator, FilesCoordinator, TorchCoordinator
    from ckptman.errors import (
        CheckpointNotFound,
        CkptmanError,
        CommitUnknown,
        Fenced,
        FormatError,
        IntegrityError,
        LockError,
        LockTimeout,
        Preempted,
        RankLost,
        SaveFailed,
        StateMismatch,
        StorageError,
        UnsupportedState,
    )
    from ckptman.manager import CheckpointManager
    from ckptman.pipeline.background import PendingSave
    from ckptman.pipeline.budget import Limits
    from ckptman.pipeline.mirroring import Mirror
    from ckptman.preemption import Preemption
    from ckptman.repository import keep
    from ckptman.repository.repository import DamagedCheckpointWarning
    from ckptman.schedule import Every
    from ckptman.types import Checkpoint, Skipped

__version__ = "0.1.0"

_HOMES = {
    "ckptman.coordinator": ("Coordinator", "FilesCoordinator", "TorchCoordinator"),
    "ckptman.errors": (
        "CheckpointNotFound", "CkptmanError", "CommitUnknown", "Fenced", "FormatError", "IntegrityError", "LockError",
        "LockTimeout", "Preempted", "RankLost", "SaveFailed", "StateMismatch", "StorageError", "UnsupportedState",
    ),
    "ckptman.manager": ("CheckpointManager",),
    "ckptman.pipeline.background": ("PendingSave",),
    "ckptman.pipeline.budget": ("Limits",),
    "ckptman.preemption": ("Preemption",),
    "ckptman.pipeline.mirroring": ("Mirror",),
    "ckptman.repository.repository": ("DamagedCheckpointWarning",),
    "ckptman.schedule": ("Every",),
    "ckptman.types": ("Checkpoint", "Skipped"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Checkpoint",
    "CheckpointManager",
    "CheckpointNotFound",
    "CkptmanError",
    "CommitUnknown",
    "Coordinator",
    "DamagedCheckpointWarning",
    "Every",
    "Fenced",
    "FilesCoordinator",
    "FormatError",
    "IntegrityError",
    "Limits",
    "LockError",
    "LockTimeout",
    "Mirror",
    "PendingSave",
    "Preempted",
    "Preemption",
    "RankLost",
    "SaveFailed",
    "Skipped",
    "StateMismatch",
    "StorageError",
    "TorchCoordinator",
    "UnsupportedState",
    "keep",
]


def __getattr__(name: str) -> object:
    if name == "keep":
        return import_module("ckptman.repository.keep")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ckptman' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
