"""How the ranks of a job talk to each other."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist


class Coordinator(Protocol):
    """Collectives of bytes."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, value: bytes) -> list[bytes] | None: ...

    def broadcast(self, value: bytes | None) -> bytes: ...

    def agree(self, value: bytes) -> list[bytes]: ...

    def close(self) -> None: ...


class Solo:
    """One process."""

    rank = 0
    world_size = 1

    def gather(self, value: bytes) -> list[bytes] | None:
        return [value]

    def broadcast(self, value: bytes | None) -> bytes:
        return value or b""

    def agree(self, value: bytes) -> list[bytes]:
        return [value]

    def close(self) -> None:
        pass


class Torch:
    """A gloo group of its own."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def gather(self, value: bytes) -> list[bytes] | None:
        found: list[bytes] | None = [b""] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, found, group=self._group)
        return found

    def broadcast(self, value: bytes | None) -> bytes:
        box = [value]
        dist.broadcast_object_list(box, group=self._group)
        return box[0] or b""

    def agree(self, value: bytes) -> list[bytes]:
        found = [b""] * self.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def close(self) -> None:
        pass


def current(coordinator: Coordinator | None) -> Coordinator:
    """The one given, or what the process has."""
    if coordinator is not None:
        return coordinator
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Torch()
    return Solo()


_ = torch
