from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from state_roundtrip import begin, frozen, load, save
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from ckptman.errors import StateMismatch, UnsupportedState
from ckptman.format.manifest import Component
from ckptman.state.capture import capture

Make = Callable[[torch.optim.Optimizer], Any]

SCHEDULERS: dict[str, Make] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, mode="exp_range", gamma=0.9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 4]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, total_iters=2),
            lr_scheduler.ExponentialLR(o, 0.8),
            lr_scheduler.CosineAnnealingLR(o, 4),
        ],
        [2, 5],
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
}
MORE: dict[str, Make] = {
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=3),
    "nested": lambda o: lr_scheduler.ChainedScheduler(
        [SCHEDULERS["SequentialLR"](o), SCHEDULERS["ChainedScheduler"](o), SCHEDULERS["MultiStepLR"](o)]
    ),
}


def test_every_scheduler_of_torch_is_covered() -> None:
    """The sweep below covers all schedulers that this torch has, and that of the averaged models."""
    present = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and name.lstrip("_") != "LRScheduler"
    }
    assert present == set(SCHEDULERS)
    assert len(present) == 15


@pytest.mark.filterwarnings("ignore::UserWarning:torch.optim.lr_scheduler")
@pytest.mark.parametrize("name", [*SCHEDULERS, *MORE])
def test_schedules_go_on(name: str) -> None:
    """The learning rates after a restore are those of the run that was not interrupted."""

    def start() -> dict[str, Any]:
        net = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        return {"net": net, "optimizer": optimizer, "scheduler": (SCHEDULERS | MORE)[name](optimizer)}

    def go(state: dict[str, Any], steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            state["optimizer"].step()
            state["scheduler"].step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append(state["optimizer"].param_groups[0]["lr"])
        return rates

    state, resumed = start(), start()
    go(state, 3)
    saved = save(state)
    expected = go(state, 4)
    load(resumed, saved)
    assert go(resumed, 4) == expected
    assert frozen(resumed["scheduler"].state_dict()) == frozen(state["scheduler"].state_dict())


def test_grad_scalers() -> None:
    """An enabled one comes back; a disabled one has nothing; the two do not fit each other."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler.scale(net(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    saved = save({"scaler": scaler})
    other = torch.amp.GradScaler("cpu")
    load({"scaler": other}, saved)
    assert other.get_scale() == scaler.get_scale() == 16.0
    disabled = save({"scaler": torch.amp.GradScaler("cpu", enabled=False)})
    load({"scaler": torch.amp.GradScaler("cpu", enabled=False)}, disabled)
    with pytest.raises(StateMismatch, match="expected an enabled GradScaler"):
        begin({"scaler": other}, disabled)


class Meter:
    """An object of the user's, with a state of every sort."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        if state == "refuse me":
            raise KeyError("no")
        self.state = state


def test_any_object_with_a_state_dict() -> None:
    """Types, orders and tensors come back; tensors are new ones, Parameters are Parameters."""
    state = {
        "tensor": torch.arange(3),
        "parameter": nn.Parameter(torch.ones(2)),
        "array": np.arange(2000.0),
        "dates": np.arange("2000-01", "2090-01", dtype="datetime64[M]"),
        "big-endian": np.arange(2000, dtype=">i4").reshape(2, -1),
        "flipped": np.arange(3000)[::-2],
        "dtype": torch.bfloat16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        3: (None, {1, 2}, 1 << 100, float("inf")),
    }
    other = Meter(None)
    load({"meter": other}, save({"meter": Meter(state)}))
    assert frozen(other.state) == frozen(state)
    assert list(other.state) == list(state)
    assert type(other.state["parameter"]) is nn.Parameter
    assert type(other.state["size"]) is torch.Size
    assert other.state["array"].flags.writeable


def test_a_refusal_by_load_state_dict_is_ours() -> None:
    """What a foreign load_state_dict raises becomes a StateMismatch that names the component."""
    with pytest.raises(StateMismatch, match="meter: its load_state_dict refused") as mismatch:
        load({"meter": Meter(0)}, save({"meter": Meter("refuse me")}))
    assert isinstance(mismatch.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (lambda: None, "without pickle"),
        (nn.Linear(1, 1), "component of its own"),
        (torch.Generator(), "component of its own"),
        (np.random.default_rng(), "component of its own"),
        (torch.qint8, "without pickle"),
        (nn.Linear, "without pickle"),
        (np.array([object()]), "without pickle"),
        (np.zeros(4, dtype=[("a", "i4")]), "without pickle"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_what_only_lives_is_refused_with_its_path(value: object, hint: str) -> None:
    """The path reads like Python, and the hint says what to do."""
    with pytest.raises(UnsupportedState, match=hint) as refusal:
        capture({"first": 1, "loader.sampler": Meter({"rng": [0, 1, 2, value]})}, rng=False)
    assert refusal.value.path == "loader.sampler['rng'][3]"


BIT_GENERATORS = sorted(
    name
    for name, kind in vars(np.random).items()
    if isinstance(kind, type) and issubclass(kind, np.random.BitGenerator) and kind is not np.random.BitGenerator
)


def test_every_bit_generator_is_covered() -> None:
    """The sweep below covers all that NumPy has."""
    assert BIT_GENERATORS == ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"]


@pytest.mark.parametrize("name", BIT_GENERATORS)
def test_numpy_generators_go_on(name: str) -> None:
    """Draws of every width continue bit for bit, in new and legacy generators; another kind does not fit."""
    kind = getattr(np.random, name)

    def draw(rng: Any) -> list[Any]:
        integers = rng.integers if isinstance(rng, np.random.Generator) else rng.randint
        return [integers(0, 9, 3, dtype=np.int32).tolist(), rng.standard_normal(3).tolist()]

    for make in (np.random.Generator, np.random.RandomState):
        rng, other = make(kind(1)), make(kind(2))
        draw(rng)
        rng.standard_normal(1)
        saved = save({"rng": rng})
        expected = draw(rng)
        load({"rng": other}, saved)
        assert draw(other) == expected
    with pytest.raises(StateMismatch):
        begin({"rng": np.random.default_rng()}, saved)
    wrong = "SFC64" if name != "SFC64" else "PCG64"
    with pytest.raises(StateMismatch, match=f"a generator of {wrong}, found one of {name}"):
        begin({"rng": np.random.RandomState(getattr(np.random, wrong)())}, saved)


def draw_all() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(1).tolist(),
        torch.rand(3).tolist(),
        torch.randn(1).tolist(),
    ]


def test_global_streams_go_on() -> None:
    """Python's, NumPy's and torch's streams continue bit for bit, half-used pairs of normals included."""
    draw_all()
    saved = save({"n": 1}, rng=True)
    expected = [draw_all() for _ in range(2)]
    assert load({"n": 0}, saved, rng=True) == {"n": 1}
    assert [draw_all() for _ in range(2)] == expected
    load({"n": 0}, saved, only=("rng",), rng=True)
    assert draw_all() == expected[0]
    load({"n": 0}, saved, only=("n",), rng=True)
    assert draw_all() == expected[1]
    load({"n": 0}, saved, rng=False)
    with pytest.warns(UserWarning, match="none were saved"):
        load({"n": 0}, save({"n": 1}), rng=True)


def test_streams_of_absent_devices_are_left_out_with_a_warning() -> None:
    """A checkpoint from a machine with an accelerator restores on one without."""
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    saved = save({"n": 1}, rng=True)
    values = bytes(saved.manifest.components["rng"].values)
    assert b'"devices":{}' in values
    values = values.replace(b'"devices":{}', b'"devices":{"cuda":[{"$":"tensor","v":"rng/torch"}]}')
    components = {**saved.manifest.components, "rng": Component(kind="rng", values=msgspec.Raw(values))}
    saved = type(saved)(msgspec.structs.replace(saved.manifest, components=components), saved.data, saved.captured)
    expected = draw_all()
    with pytest.warns(UserWarning, match="1 random streams of cuda devices were saved, 0 are here"):
        load({"n": 0}, saved, rng=True)
    assert draw_all() == expected


def test_torch_generators_go_on() -> None:
    """A generator of the user's continues bit for bit."""
    generator, other = torch.Generator().manual_seed(1), torch.Generator()
    torch.randn(3, generator=generator)
    saved = save({"g": generator})
    expected = torch.randn(5, generator=generator)
    load({"g": other}, saved)
    assert torch.equal(torch.randn(5, generator=other), expected)


class Greedy:
    """Draws from every stream when asked for its state, and when given it."""

    def state_dict(self) -> dict[str, object]:
        draw_all()
        return {"n": 1}

    def load_state_dict(self, state: dict[str, object]) -> None:
        draw_all()


def test_foreign_methods_do_not_move_the_streams() -> None:
    """What state_dict draws is put back, also when the capture fails; what is saved is what was before."""
    before = torch.get_rng_state(), random.getstate()
    state = {"greedy": Greedy(), "n": 1}
    saved = save(state, rng=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    with pytest.raises(UnsupportedState):
        capture({"greedy": Greedy(), "no": lambda: None}, rng=False)
    assert random.getstate() == before[1]
    expected = draw_all()
    load(state, saved, rng=True)
    assert draw_all() == expected


def test_modules_come_first_and_streams_last() -> None:
    """Whatever the order in the state: modules, optimizers, the rest."""
    order: list[str] = []

    class Told(Meter):
        def load_state_dict(self, state: Any) -> None:
            order.append(f"{self.state}: {float(weight):g} {optimizer.param_groups[0]['lr']}")

    weight = nn.Parameter(torch.tensor(1.0))
    module = nn.Module()
    module.w = weight
    optimizer = torch.optim.SGD([weight], lr=0.5)
    module.register_load_state_dict_post_hook(lambda *_: order.append(f"module {optimizer.param_groups[0]['lr']}"))
    state = {"a": Told("a"), "optimizer": optimizer, "model": module, "b": Told("b")}
    saved = save(state)
    optimizer.param_groups[0]["lr"] = 7.0
    with torch.no_grad():
        weight.zero_()
    load(state, saved)
    assert order == ["module 7.0", "a: 1 0.5", "b: 1 0.5"]
