"""What the distributed tests train: small, with uneven and empty shards, in every way of spreading it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

State = dict[str, Any]


def plain() -> nn.Sequential:
    """18, 10 and 3 rows: uneven over 4 ranks, and none on one of them."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 18), nn.Linear(18, 10), nn.Linear(10, 3))


def fsdp() -> nn.Module:
    model = plain()
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def fsdp1() -> nn.Module:
    """Cut among the ranks in the middle of rows. The device makes torch run it on a CPU."""
    wrap = lambda part: FullyShardedDataParallel(part, use_orig_params=True, device_id=torch.device("cpu"))
    return wrap(nn.Sequential(*map(wrap, plain())))


def hsdp() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = plain()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tp_fsdp() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = plain()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for layer in model:
        fully_shard(layer, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def ddp() -> nn.Module:
    return nn.parallel.DistributedDataParallel(plain())


SPREADS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "fsdp": fsdp,
    "fsdp1": fsdp1,
    "hsdp": hsdp,
    "tp_fsdp": tp_fsdp,
    "ddp": ddp,
}


def state_of(spread: str) -> State:
    model = SPREADS[spread]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def step(state: State, spread: str, number: int) -> None:
    """One step on the same 12 examples whatever the number of ranks; those that share data take the same part."""
    rank, parts = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    part, parts = (rank // 2, parts // 2) if spread == "tp_fsdp" else (rank, parts)
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(12, 6, generator=generator)[part::parts]
    loss = (state["model"](inputs) - inputs[:, :3].cumsum(dim=1)).square().mean()
    state["optimizer"].zero_grad()
    loss.backward()
    state["optimizer"].step()
    state["scheduler"].step()


def whole(tensor: torch.Tensor) -> list[Any]:
    """The values of *tensor*, gathered where it is sharded: collective."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().double().tolist()


def facts(state: State) -> dict[str, Any]:
    """Every weight and moment of *state* by name, gathered. Collective."""
    if isinstance(state["model"], FullyShardedDataParallel):
        return _facts_of_fsdp1(state)
    found = {}
    inner = getattr(state["model"], "module", state["model"])
    for name, parameter in inner.named_parameters():
        found[name] = whole(parameter)
        for key, value in state["optimizer"].state[parameter].items():
            found[f"{name}.{key}"] = whole(value)
    found["lr"] = state["scheduler"].get_last_lr()
    return found


def _facts_of_fsdp1(state: State) -> dict[str, Any]:
    """Of each, what the ranks hold, one after the other: torch's ``optim_state_dict`` mixes up moments on a CPU."""
    model, optimizer = state["model"], state["optimizer"]
    shapes = {name: parameter.shape for name, parameter in plain().named_parameters()}
    mine = {}
    for name, parameter in model.named_parameters():
        kept = optimizer.state.get(parameter, {}).items() if parameter.numel() else ()
        values = {key: value.detach().double() for key, value in kept}
        mine[name.replace("_fsdp_wrapped_module.", "")] = {"": parameter.detach().double(), **values}
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, mine)
    found = {}
    for name, shape in shapes.items():
        found[name] = torch.cat([one[name][""] for one in by_rank]).view(shape).tolist()
        holding = [one[name] for one in by_rank if len(one[name]) > 1]
        for key in holding[0].keys() - {""}:
            values = [one[key] for one in holding]
            is_whole = values[0].dim() == 0
            assert not is_whole or all(torch.equal(value, values[0]) for value in values)
            found[f"{name}.{key}"] = (values[0] if is_whole else torch.cat(values).view(shape)).tolist()
    found["lr"] = state["scheduler"].get_last_lr()
    return found
