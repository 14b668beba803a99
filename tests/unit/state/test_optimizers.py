from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from state_roundtrip import frozen, load, save
from torch import nn

from ckptman.errors import StateMismatch, UnsupportedState
from ckptman.state.capture import capture

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)

SPECIAL: dict[str, list[dict[str, object]]] = {
    "SGD": [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.1}],
    "Adam": [{}, {"amsgrad": True}, {"foreach": False}, {"lr": torch.tensor(0.01), "foreach": False}, {"fused": True}],
    "AdamW": [{}, {"fused": True}, {"maximize": True}],
    "RMSprop": [{"momentum": 0.5, "centered": True}],
    "LBFGS": [{"max_iter": 4, "history_size": 3}, {"line_search_fn": "strong_wolfe", "max_iter": 4}],
    "Adadelta": [{}],
}
CASES = [(name, kwargs) for name in OPTIMIZERS for kwargs in SPECIAL.get(name, [{}])]


class Net(nn.Module):
    """Two layers, tied; one of them frozen; matrices only where an optimizer wants them."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=bias)
        self.frozen = nn.Linear(4, 4, bias=bias)
        self.second = nn.Linear(4, 4, bias=bias)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(torch.tanh(self.second(torch.tanh(self.frozen(torch.tanh(self.first(x)))))))


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table((x[:, 0].abs() * 5).long() % 16)


def make(name: str, kwargs: dict[str, object], seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net: nn.Module = Lookup() if name == "SparseAdam" else Net(bias=name != "Muon")
    kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, name)
    return net, kind([p for p in net.parameters() if p.requires_grad], **copy.deepcopy(kwargs))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (net(x) - 1).float().square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def test_every_optimizer_of_torch_is_covered() -> None:
    """The sweep below covers all optimizers that this torch has."""
    assert len(OPTIMIZERS) == 15
    assert len(CASES) == 23


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=lambda value: str(value).replace(" ", "")[:40])
def test_training_goes_on_bit_for_bit(name: str, kwargs: dict[str, object]) -> None:
    """Three steps, a save, three more; fresh objects, a restore, three steps: the same weights and moments."""
    net, optimizer = make(name, kwargs, 0)
    train(net, optimizer, range(3))
    before = frozen(optimizer.state_dict())
    saved = save({"model": net, "optimizer": optimizer})
    assert frozen(optimizer.state_dict()) == before
    train(net, optimizer, range(3, 6))

    other, resumed = make(name, kwargs, 1)
    load({"model": other, "optimizer": resumed}, saved)
    assert frozen(resumed.state_dict()) == before
    train(other, resumed, range(3, 6))
    assert frozen(other.state_dict()) == frozen(net.state_dict())
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_running_optimizer_goes_back(name: str) -> None:
    """A restore into objects that have trained on gives what was saved, and no more."""
    net, optimizer = make(name, SPECIAL.get(name, [{}])[0], 0)
    train(net, optimizer, range(2))
    before = frozen((net.state_dict(), optimizer.state_dict()))
    saved = save({"model": net, "optimizer": optimizer})
    train(net, optimizer, range(2, 4))
    load({"model": net, "optimizer": optimizer}, saved)
    assert frozen((net.state_dict(), optimizer.state_dict())) == before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_optimizer_is_captured_as_it_is(name: str) -> None:
    """A save at step 0 changes nothing, and a restore of it clears what a live optimizer has gathered."""
    net, optimizer = make(name, SPECIAL.get(name, [{}])[0], 0)
    before = frozen(optimizer.state_dict())
    empty = not optimizer.state
    saved = save({"model": net, "optimizer": optimizer})
    assert frozen(optimizer.state_dict()) == before
    assert (not optimizer.state) == empty
    train(net, optimizer, range(2))
    load({"model": net, "optimizer": optimizer}, saved)
    assert frozen(optimizer.state_dict()) == before


def test_moments_keep_their_own_dtype() -> None:
    """fp32 moments of bf16 parameters, and a step of float64, come back as they were, not cast."""

    def make_pair(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        net = Net().bfloat16()
        return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], foreach=False)

    net, optimizer = make_pair(0)
    train(net, optimizer, range(1))
    for state in optimizer.state.values():
        state.update({key: state[key].float() * 1.0001 for key in ("exp_avg", "exp_avg_sq")})
        state["step"] = state["step"].double()
    before = frozen(optimizer.state_dict())
    saved = save({"model": net, "optimizer": optimizer})
    other, resumed = make_pair(1)
    load({"model": other, "optimizer": resumed}, saved)
    assert frozen(resumed.state_dict()) == before
    assert {value.dtype for state in resumed.state.values() for value in state.values()} == {
        torch.float32,
        torch.float64,
    }


def test_state_that_torch_would_take_apart_comes_back() -> None:
    """Text, None, arrays and nested containers in a parameter's state survive, although torch mangles them."""
    net, optimizer = make("SGD", {"lr": 0.1}, 0)
    parameter = optimizer.param_groups[0]["params"][0]
    inner = {"text": "word", "none": None, "list": [torch.ones(2, dtype=torch.float64), "x"], "pair": (1, 2.5)}
    optimizer.state[parameter] = {"inner": inner, "text": "w"}
    optimizer.state["global"] = {"count": 3}  # type: ignore[index]
    before = frozen(optimizer.state_dict())
    saved = save({"model": net, "optimizer": optimizer})
    other, resumed = make("SGD", {"lr": 0.1}, 1)
    load({"model": other, "optimizer": resumed}, saved)
    assert frozen(resumed.state_dict()) == before


def test_parameters_are_matched_by_name_not_by_position() -> None:
    """Members of a group may have changed places, and modules too: every one gets its own moments."""

    def make_two(seed: int, *, swapped: bool) -> tuple[dict[str, object], list[nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(seed)
        one, two = nn.Linear(4, 4), nn.Linear(4, 4)
        members = [*one.parameters(), *two.parameters()]
        groups = [{"params": members[:2] + members[3:], "lr": 0.1}, {"params": members[2:3], "lr": 0.2}]
        if swapped:
            groups[0]["params"] = list(reversed(groups[0]["params"]))  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(groups)
        state = {"two": two, "one": one} if swapped else {"one": one, "two": two}
        return {**state, "optimizer": optimizer}, members, optimizer

    state, members, optimizer = make_two(0, swapped=False)
    for step, member in enumerate(members):
        member.grad = torch.full_like(member, step + 1.0)
    optimizer.step()
    saved = save(state)
    swapped, others, resumed = make_two(1, swapped=True)
    load(swapped, saved)
    for member, other in zip(members, others, strict=True):
        assert frozen(optimizer.state[member]) == frozen(resumed.state[other])
    assert [group["lr"] for group in resumed.param_groups] == [0.1, 0.2]


def test_a_parameter_with_several_names_is_found_by_any() -> None:
    """A module that is also a part of another: whichever comes first in the state."""

    def start(*order: str) -> tuple[dict[str, Any], nn.Sequential]:
        whole = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        parts = {"whole": whole, "part": whole[1]}
        return {**{name: parts[name] for name in order}, "optimizer": torch.optim.Adam(whole.parameters())}, whole

    state, whole = start("whole", "part")
    whole(torch.ones(1, 2)).sum().backward()
    state["optimizer"].step()
    other, _ = start("part", "whole")
    load(other, save(state))
    assert frozen(other["optimizer"].state_dict()) == frozen(state["optimizer"].state_dict())


def test_moments_take_the_memory_format_of_their_parameter() -> None:
    """The moments of a channels-last weight are channels-last again, and new ones are on its device."""
    net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    saved = save({"net": net, "optimizer": optimizer})
    other = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    resumed = torch.optim.Adam(other.parameters())
    load({"net": other, "optimizer": resumed}, saved)
    assert resumed.state[other.weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())


def test_tensor_components_are_members_too() -> None:
    """An optimizer over a tensor of the state finds its name."""
    point = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([point], lr=0.1, momentum=0.9)
    point.grad = torch.ones(3)
    optimizer.step()
    saved = save({"point": point, "optimizer": optimizer})
    other = torch.zeros(3, requires_grad=True)
    resumed = torch.optim.SGD([other], lr=0.5, momentum=0.9)
    load({"point": other, "optimizer": resumed}, saved)
    assert torch.equal(other, point)
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())


def test_named_parameters_keep_their_live_order() -> None:
    """An optimizer built from named_parameters has its live names after a restore, in its own order."""
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    saved = save({"net": net, "optimizer": torch.optim.SGD(net.named_parameters(), lr=0.1)})
    resumed = torch.optim.SGD(list(reversed(list(other.named_parameters()))), lr=0.1)
    load({"net": other, "optimizer": resumed}, saved)
    assert resumed.param_groups[0]["param_names"] == ["bias", "weight"]


def test_a_parameter_without_a_name_is_refused_with_a_hint() -> None:
    """The message says which parameter it is, and what to do."""
    optimizer = torch.optim.SGD([torch.ones(3, 2, requires_grad=True)], lr=0.1)
    with pytest.raises(UnsupportedState, match=r"\[3, 2\].*Add the module that owns it") as refusal:
        capture({"optimizer": optimizer}, rng=False)
    assert refusal.value.path == "optimizer.param_groups[0]['params'][0]"


@pytest.mark.parametrize("which", ["group", "member", "kind", "shape"])
def test_other_groups_or_members_are_differences(which: str) -> None:
    """A group more, a member moved, another class, another shape: refused before anything is touched."""
    net = Net()
    free = [p for p in net.parameters() if p.requires_grad]
    saved = save({"model": net, "optimizer": torch.optim.Adam(free)})
    other = {
        "group": lambda: torch.optim.Adam([{"params": free[:1]}, {"params": free[1:]}]),
        "member": lambda: torch.optim.Adam(free[1:]),
        "kind": lambda: torch.optim.SGD(free),
        "shape": lambda: torch.optim.Adam([p for p in Net().parameters() if p.requires_grad]),
    }
    if which == "shape":
        wide = nn.Linear(5, 4)
        net2 = nn.Module()
        net2.first = wide
        small = nn.Module()
        small.first = nn.Linear(4, 4)
        saved = save({"model": small, "optimizer": torch.optim.Adam(small.parameters())})
        with pytest.raises(StateMismatch, match=r"first.weight: expected a parameter \[4, 5\], found one \[4, 4\]"):
            load({"model": net2, "optimizer": torch.optim.Adam(net2.parameters())}, saved, only=("optimizer",))
        return
    resumed = other[which]()
    before = frozen(resumed.state_dict())
    with pytest.raises(StateMismatch) as mismatch:
        load({"model": net, "optimizer": resumed}, saved)
    assert frozen(resumed.state_dict()) == before
    wanted = {"group": "groups of parameters", "member": "model/first.weight is in the checkpoint", "kind": "of a SGD"}
    assert wanted[which] in str(mismatch.value)


def test_new_members_are_tolerated_where_that_is_asked_for() -> None:
    """strict=False leaves a parameter that the checkpoint does not know without state, and says so once."""
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam([net.weight])
    net.weight.grad = torch.ones(2, 2)
    optimizer.step()
    saved = save({"net": net, "optimizer": optimizer})
    resumed = torch.optim.Adam(net.parameters())
    with pytest.warns(UserWarning, match="net/bias is expected"):
        load({"net": net, "optimizer": resumed}, saved, strict=False)
    assert net.weight in resumed.state
    assert net.bias not in resumed.state


class Fancy(torch.optim.SGD):
    """Saves in a format of its own."""

    def state_dict(self) -> dict[str, object]:
        return {"fancy": 7, "inner": super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.got = state_dict["fancy"]
        super().load_state_dict(state_dict["inner"])  # type: ignore[arg-type]


def test_an_optimizer_with_a_format_of_its_own_is_just_stateful() -> None:
    """Nothing is made of a state_dict that is not torch's: it goes back as it came."""
    net = nn.Linear(2, 2)
    saved = save({"net": net, "optimizer": Fancy(net.parameters(), lr=0.25)})
    assert saved.manifest.components["optimizer"].kind == "stateful"
    resumed = Fancy(net.parameters(), lr=0.5)
    load({"net": net, "optimizer": resumed}, saved)
    assert (resumed.got, resumed.param_groups[0]["lr"]) == (7, 0.25)


@pytest.mark.parametrize("is_standard", [True, False])
def test_the_optimizer_is_asked_for_its_state_once(is_standard: bool) -> None:
    """Two answers may differ, and each may be expensive."""
    asked = []

    class Counting(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            asked.append(self)
            return super().state_dict() if is_standard else {"asked": len(asked)}

    model = nn.Linear(2, 2)
    captured = capture({"model": model, "optimizer": Counting(model.parameters(), lr=0.1)}, rng=False)
    assert captured["optimizer"].kind == ("optimizer" if is_standard else "stateful")
    assert len(asked) == 1


def test_hooks_of_the_optimizer_run() -> None:
    """A restore goes through load_state_dict, so its hooks see it."""
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    saved = save({"net": net, "optimizer": optimizer})
    seen: list[object] = []
    optimizer.register_load_state_dict_post_hook(seen.append)
    load({"net": net, "optimizer": optimizer}, saved)
    assert seen == [optimizer]


def test_nothing_is_warned_of_in_a_plain_round_trip() -> None:
    """A restore that fits is silent."""
    net, optimizer = make("Adam", {}, 0)
    train(net, optimizer, range(1))
    saved = save({"model": net, "optimizer": optimizer}, rng=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load({"model": net, "optimizer": optimizer}, saved, rng=True)
