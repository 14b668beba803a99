"""Who saves and restores from four ranks: ckptman, plain files of the same bytes (unchecked, checked), torch DCP."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from benchmarks import system
from ckptman import CheckpointManager, Limits

LAYERS = 4


class Job:
    """A model in shards whose parameters and two moments have about *mib* MiB in all, after one step."""

    def __init__(self, mib: int) -> None:
        width = int((mib * (1 << 20) / 12 / LAYERS) ** 0.5)
        self.model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(LAYERS)))
        for layer in self.model:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.randn(4, width)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[torch.Tensor]:
        """What this rank holds."""
        found = [parameter.to_local().detach() for parameter in self.model.parameters()]
        for state in self.optimizer.state.values():
            found += [value.to_local() for value in state.values() if hasattr(value, "to_local")]
        return found

    def parts(self) -> list[memoryview]:
        """Their memory."""
        return [memoryview(tensor.view(-1).view(torch.uint8).numpy()) for tensor in self.tensors()]

    def fingerprint(self) -> list[str]:
        return [xxhash.xxh3_128_hexdigest(part) for part in self.parts()]

    def change(self) -> None:
        """Change every value, alike on all ranks."""
        for tensor in self.tensors():
            tensor.add_(1)

    def wipe(self) -> None:
        """Forget all values."""
        for tensor in self.tensors():
            tensor.zero_()


class RankTool(Protocol):
    """Saves under *folder*, by number. Every method is collective."""

    name: str

    def save(self, number: int) -> None:
        """Return once the bytes and all names would survive a power loss."""

    def load(self, number: int) -> None:
        """Fill the live objects."""

    def close(self) -> None: ...


class RankAsyncTool(RankTool, Protocol):
    """One that can also save behind training."""

    def begin(self, number: int) -> Callable[[], object]:
        """Return once training may go on; what is returned waits until the bytes are durable."""


class Plain:
    """The floor: one file per rank, without names, digests or a commit."""

    name = "plain"

    def __init__(self, folder: Path, rank: int, job: Job) -> None:
        self._folder, self._rank, self._job = folder, rank, job

    def save(self, number: int) -> None:
        path = self._path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb", buffering=0) as file:
            for chunk in self._chunks():
                file.write(chunk)
            os.fsync(file.fileno())
        system.fsync(path.parent)

    def load(self, number: int) -> None:
        with self._path(number).open("rb", buffering=0) as file:
            for chunk in self._chunks():
                file.readinto(chunk)

    def close(self) -> None:
        pass

    def _chunks(self) -> Iterator[memoryview]:
        for part in self._job.parts():
            for start in range(0, len(part), system.CHUNK):
                yield part[start : start + system.CHUNK]

    def _path(self, number: int) -> Path:
        return self._folder / str(number) / str(self._rank)


class Checked(Plain):
    """The floor of who checks every byte: the same files, and xxh3-128 of each chunk."""

    name = "plain, checked"

    def __init__(self, folder: Path, rank: int, job: Job) -> None:
        super().__init__(folder, rank, job)
        self._digests: dict[int, list[bytes]] = {}

    def save(self, number: int) -> None:
        self._digests[number] = list(map(xxhash.xxh3_128_digest, self._chunks()))
        super().save(number)

    def load(self, number: int) -> None:
        with self._path(number).open("rb", buffering=0) as file:
            for chunk, digest in zip(self._chunks(), self._digests[number], strict=True):
                file.readinto(chunk)
                if xxhash.xxh3_128_digest(chunk) != digest:
                    raise AssertionError(f"{self._path(number)} is damaged")


class Ckptman:
    """All of it: digests, manifest, commit; every byte checked when it is read."""

    name = "ckptman"

    def __init__(self, folder: Path, rank: int, job: Job, *, prefault: bool = True) -> None:
        state = {"model": job.model, "optimizer": job.optimizer}
        self._manager = CheckpointManager(folder, state, limits=Limits(prefault=prefault))

    def save(self, number: int) -> None:
        self._manager.save(number, block=True)

    def begin(self, number: int) -> Callable[[], object]:
        return self._manager.save(number).result

    def load(self, number: int) -> None:
        self._manager.restore(number)

    def close(self) -> None:
        self._manager.close()


class Dcp:
    """
    As its documentation says. It fsyncs its files by itself; here its folder too, inside the timer.

    The asynchronous one has a gloo group of its own, as it wants.
    """

    name = "DCP"

    def __init__(self, folder: Path, rank: int, job: Job) -> None:
        self._folder, self._rank, self._job = folder, rank, job
        self._group = dist.new_group(backend="gloo")

    def save(self, number: int) -> None:
        dcp.save(self._state(), checkpoint_id=self._folder / str(number))
        self._persist(number)

    def begin(self, number: int) -> Callable[[], object]:
        future = dcp.async_save(self._state(), checkpoint_id=self._folder / str(number), process_group=self._group)

        def wait() -> None:
            future.result()
            self._persist(number)

        return wait

    def load(self, number: int) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=self._folder / str(number))
        set_state_dict(
            self._job.model,
            self._job.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def close(self) -> None:
        pass

    def _state(self) -> dict[str, dict[str, object]]:
        weights, moments = get_state_dict(self._job.model, self._job.optimizer)
        return {"model": weights, "optimizer": moments}

    def _persist(self, number: int) -> None:
        if self._rank == 0:
            system.fsync(self._folder / str(number))
            system.fsync(self._folder)
