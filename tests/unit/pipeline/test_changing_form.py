"""A state that changes its form between two saves: what is saved is what lives now, never what a plan remembers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ckptman import CheckpointManager
from ckptman.format.names import Attempt

Tensors = dict[str, torch.Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.spare = nn.Parameter(torch.randn(3))


def replaced(model: Net, optimizer: torch.optim.Optimizer) -> None:
    old, new = model.first.weight, nn.Parameter(torch.full((3, 3), 7.0))
    model.first.weight = new
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = {key: value + 1 for key, value in optimizer.state.pop(old).items()}


def given_other_memory(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.first.weight.data = torch.full((3, 3), 8.0)


def group_added(model: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [model.spare], "lr": 0.5})
    train(model, optimizer)


def cast(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.second.to(torch.float64)
    state = optimizer.state[model.second.weight]
    state["exp_avg"] = state["exp_avg"].double()


def module_added(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.third = nn.BatchNorm1d(3)


def module_removed(model: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [model.spare]})
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:2]
    for parameter in model.second.parameters():
        del optimizer.state[parameter]
    del model.second


def tied(model: Net, optimizer: torch.optim.Optimizer) -> None:
    assert optimizer.param_groups[0]["params"].pop(2) is model.second.weight
    del optimizer.state[model.second.weight]
    model.second.weight = model.first.weight


def hooked(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model.first.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({f"{prefix}weight": state[f"{prefix}weight"] * 2})
    )


def moments_of_another_key(model: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.first.weight]["exp_avg_of_mine"] = torch.ones(2)


def a_number_among_the_moments(model: Net, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.first.bias]["count"] = 3


CHANGES: list[Callable[[Net, torch.optim.Optimizer], None]] = [
    replaced, given_other_memory, group_added, cast, module_added, module_removed, tied, hooked,
    moments_of_another_key, a_number_among_the_moments,
]  # fmt: skip


def train(model: Net, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_save_holds_what_lives_now(
    tmp_path: Path, change: Callable[[Net, torch.optim.Optimizer], None], overlap: bool
) -> None:
    """After two saves of the same form, the tensors of the third are those of torch's own state dicts."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW([*model.first.parameters(), *model.second.parameters()])
    with CheckpointManager(tmp_path, {"model": model, "optimizer": optimizer}, overlap=overlap) as manager:
        for step in (1, 2):
            train(model, optimizer)
            manager.save(step).result()
        change(model, optimizer)
        manager.save(3).result()
        assert_same(files_of(tmp_path, 3, "model"), distinct(model.state_dict()))
        assert_same(files_of(tmp_path, 3, "optimizer"), distinct(moments(model, optimizer)))


def files_of(root: Path, step: int, component: str) -> Tensors:
    (folder,) = [one for one in root.iterdir() if (attempt := Attempt.parse(one.name)) and attempt.step == step]
    return {
        name: tensor for path in folder.glob(f"{component}*.safetensors") for name, tensor in load_file(path).items()
    }


def moments(model: Net, optimizer: torch.optim.Optimizer) -> Tensors:
    return {
        f"model/{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def distinct(tensors: Tensors) -> Tensors:
    """Without further names of a tensor."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.data_ptr(), name)
    return {name: tensor.detach() for name, tensor in tensors.items() if first[tensor.data_ptr()] == name}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
