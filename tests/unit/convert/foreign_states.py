"""States that the tests of conversions make, train, and compare bit for bit."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ckptman import CheckpointManager
from ckptman.format.dtypes import DTYPES
from ckptman.state.tensors import as_bytes


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(as_bytes(tensor.detach().contiguous()))


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Equal in every bit, type and order."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), path
        assert (one.dtype, tuple(one.shape)) == (other.dtype, tuple(other.shape)), path
        assert bits(one) == bits(other), path
    elif isinstance(one, Mapping):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert type(one) is type(other), path
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert type(one) is type(other), path
        assert one == other or (one != one and other != other), path


def random_tensor(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random bits of any type (0 and 1 for bool)."""
    nbytes = DTYPES[dtype].itemsize
    for n in shape:
        nbytes *= n
    high = 2 if dtype == "bool" else 256
    raw = torch.randint(0, high, (nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(getattr(torch, dtype)).reshape(shape)


class Net(torch.nn.Module):
    """Two layers, a buffer, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.second = torch.nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(inputs)))


class Run:
    """A training run that can be continued; ``named`` says whether its optimizer knows names."""

    def __init__(self, seed: int = 0, *, named: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        parameters = self.model.named_parameters() if named else self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            loss = (self.model(inputs) - inputs).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def states(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.state.items()}


def restored(root: Path, state: Mapping[str, object], **options: Any) -> Any:
    with CheckpointManager(root, state, rng=False) as manager:
        return manager.restore(**options)


def zipped(records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()


def names_in(data: bytes) -> set[str]:
    return {argument for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
