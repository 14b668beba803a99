"""The door: what ``import ckptman`` offers, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import ckptman


def test_every_name_of_the_door_can_be_had() -> None:
    """Whatever ``__all__`` and ``dir`` promise exists, and an unknown name is an AttributeError."""
    assert len(ckptman.__all__) == 27
    assert dir(ckptman) == sorted(ckptman.__all__)
    for name in ckptman.__all__:
        assert getattr(ckptman, name) is not None
    assert not hasattr(ckptman, "no_such_name")


def test_the_lower_floors_come_without_torch() -> None:
    """Errors, types, events, storages, the format and the repository load without torch, in a fresh process."""
    program = (
        "import sys, ckptman, ckptman.errors, ckptman.types, ckptman.events, ckptman.storage.opening\n"
        "import ckptman.format.safetensors_layout, ckptman.format.values, ckptman.repository.repair, ckptman.keep\n"
        "assert 'torch' not in sys.modules"
    ).replace(", ckptman.keep", "\nfrom ckptman import keep")
    subprocess.run([sys.executable, "-c", program], check=True)
