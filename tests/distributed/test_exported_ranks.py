"""Checkpoints that several ranks wrote in pieces, exported: whole tensors, and a word on what is left out."""

from pathlib import Path
from typing import Any

import fleet
import safetensors.torch
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ckptman import CheckpointManager
from ckptman.convert import export_checkpoint, import_checkpoint

WHOLE = torch.arange(35.0).reshape(7, 5)


class Sharded(torch.nn.Module):
    """Three parameters, each spread in another way."""

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (2,))
        for name, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("copies", Replicate())):
            tensor = distribute_tensor(WHOLE, mesh, [placement])
            self.register_parameter(name, torch.nn.Parameter(tensor))


def save(rank: int, root: str) -> str:
    with CheckpointManager(root, {"model": Sharded(), "own": {"rank": rank}}) as manager:
        manager.save(1, block=True)
    return "saved"


def test_pieces_become_whole_tensors(tmp_path: Path) -> None:
    """In every format the tensors are those that were spread; what single ranks had of their own is told."""
    assert fleet.run(tmp_path, 2, save, str(tmp_path / "root")) == ["saved", "saved"]
    for to, out in (("torch", "a.pt"), ("safetensors", "a.safetensors"), ("dcp", "dcp")):
        done = export_checkpoint(tmp_path / "root", 1, tmp_path / out, to=to)
        assert {sentence.partition(":")[0] for sentence in done.left_out} == {"own", "rng"}
    found: list[dict[str, Any]] = [
        torch.load(tmp_path / "a.pt", weights_only=True)["model"],
        {
            name.removeprefix("model/"): tensor
            for name, tensor in safetensors.torch.load_file(tmp_path / "a.safetensors").items()
        },
    ]
    import_checkpoint(tmp_path / "again", tmp_path / "dcp", step=1)
    export_checkpoint(tmp_path / "again", 1, tmp_path / "again.pt", to="torch", components=["model"])
    found.append(torch.load(tmp_path / "again.pt", weights_only=True)["model"])
    for tensors in found:
        assert all(torch.equal(tensors[name], WHOLE) for name in ("rows", "columns", "copies"))
