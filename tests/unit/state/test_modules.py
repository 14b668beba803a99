from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from state_roundtrip import begin, fill, frozen, load, save
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from ckptman.errors import FormatError, StateMismatch, UnsupportedState
from ckptman.format.manifest import Component
from ckptman.state.capture import capture


class Inner(nn.Module):
    """A module whose own submodules have the names that wrappers use."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.module = nn.Linear(width, 3)
        self._orig_mod = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._orig_mod(self.module(x))
        return out


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), Inner())


def scrambled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.random_(0, 7)
    return module


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = torch.distributed.FileStore(os.fspath(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrap(module: nn.Sequential, how: str) -> nn.Module:
    if how == "compiled":
        return torch.compile(module, backend="eager")  # type: ignore[return-value]
    if how == "compiled inside":
        module[1] = torch.compile(module[1], backend="eager")
        return module
    if how == "compiled in place":
        module.compile(backend="eager")
        return module
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(module)
    if how == "compiled ddp of compiled":
        module[0] = torch.compile(module[0], backend="eager")
        return torch.compile(nn.parallel.DistributedDataParallel(module), backend="eager")  # type: ignore[return-value]
    return nn.DataParallel(module) if how == "dp" else module


WRAPPINGS = ["plain", "compiled", "compiled inside", "compiled in place", "ddp", "compiled ddp of compiled", "dp"]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("how", WRAPPINGS)
def test_wrappers_leave_no_trace(how: str, hooked: bool) -> None:
    """From wrapped to plain and back: the names are the plain module's, also where a hook wants its say."""
    plain = scrambled(nested())
    if hooked:
        plain[0].register_state_dict_post_hook(lambda *_: None)
    wrapped = wrap(plain, how)  # type: ignore[arg-type]
    saved = save({"model": wrapped})
    names = {tensor.name for tensor in saved.manifest.tensors}
    assert names == {f"model/{name}" for name in nested().state_dict()}
    other = nested()
    load({"model": other}, saved)
    assert frozen(dict(other.named_buffers())) == frozen(dict(nested_plain(plain).named_buffers()))

    back = nested()
    if hooked:
        back[0].register_state_dict_post_hook(lambda *_: None)
    target = wrap(back, how)
    load({"model": target}, save({"model": other}))
    assert frozen(list(target.parameters())) == frozen(list(other.parameters()))
    assert len(list(other.parameters())) == 6


def nested_plain(module: nn.Module) -> nn.Module:
    copy = nested()
    load({"model": copy}, save({"model": module}))
    return copy


def test_restoring_is_in_place() -> None:
    """Parameters and buffers keep identity and memory; scratch buffers are neither saved nor touched."""
    model = nested()
    before = {name: (id(p), p.data_ptr()) for name, p in (*model.named_parameters(), *model.named_buffers())}
    model[1].scratch.fill_(5)
    saved = save({"model": scrambled(nested())})
    load({"model": model}, saved)
    assert before == {name: (id(p), p.data_ptr()) for name, p in (*model.named_parameters(), *model.named_buffers())}
    assert model[1].scratch.tolist() == [5, 5]
    assert all("scratch" not in tensor.name for tensor in saved.manifest.tensors)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Tied(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        if tied:
            self.b.weight = self.a.weight


def test_tied_weights_are_stored_once_and_tied_again() -> None:
    """An alias is listed; both names come back, on a tied model and on one that is not."""
    saved = save({"model": scrambled(Tied(tied=True))})
    assert [tensor.name for tensor in saved.manifest.tensors] == ["model/a.weight"]
    assert saved.manifest.aliases == {"model/b.weight": "model/a.weight"}
    for tied in (True, False):
        model = Tied(tied=tied)
        load({"model": model}, saved)
        assert (model.a.weight is model.b.weight) == tied
        assert frozen(model.a.weight) == frozen(model.b.weight) == frozen(torch.empty(2, 2).copy_(_first(saved)))


def _first(saved: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(saved.data["model/a.weight"]), dtype=torch.float32).reshape(2, 2)


def test_a_name_that_is_tied_to_a_saved_one_is_not_missing() -> None:
    """Files of others have a tied weight once. The live model says which names are one; any other is missed."""
    saved = save({"model": scrambled(nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)}))})
    model = Tied(tied=True)
    load({"model": model}, saved)
    assert frozen(model.b.weight) == frozen(torch.empty(2, 2).copy_(_first(saved)))
    with pytest.raises(StateMismatch, match=r"b\.weight"):
        load({"model": Tied(tied=False)}, saved)


def test_untied_weights_do_not_fit_a_tied_model() -> None:
    """Two different tensors cannot go into one: refused; two equal ones can."""
    model = Tied(tied=False)
    with pytest.raises(StateMismatch, match="tied to another"):
        load({"model": Tied(tied=True)}, save({"model": model}))
    with torch.no_grad():
        model.b.weight.copy_(model.a.weight)
    tied = Tied(tied=True)
    load({"model": tied}, save({"model": model}))
    assert frozen(tied.a.weight) == frozen(model.a.weight)


class WithExtra(nn.Module):
    def __init__(self, extra: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra = extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def test_extra_state_comes_back() -> None:
    """Whatever get_extra_state gives goes to set_extra_state, tensors included; what cannot be saved is refused."""
    extra = {"scale": torch.arange(3.0), "history": [(1, None)]}
    other = nn.Sequential(WithExtra(None))
    load({"model": other}, save({"model": nn.Sequential(WithExtra(extra))}))
    assert frozen(other[0].extra) == frozen(extra)
    assert type(other[0].extra["history"][0]) is tuple
    with pytest.raises(UnsupportedState, match=r"_extra_state"):
        capture({"model": WithExtra(lambda: None)}, rng=False)


def make_hooked(how: str) -> nn.Module:
    torch.manual_seed(0)
    if how == "weight_norm":
        return nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    if how == "spectral_norm":
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)))
    if how == "old weight_norm":
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    return torch.jit.script(nn.Linear(3, 3)) if how == "script" else Overriding()


class Overriding(nn.Module):
    """Saves something that is not its own parameter, and wants to know which version it loads."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2))
        self.count = 0

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}half"] = self.weight.detach() / 2
        destination[f"{prefix}count"] = self.count

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        assert rest[0] == {"version": 3}
        self.count = state_dict.pop(f"{prefix}count") + 1
        self.half = state_dict.pop(f"{prefix}half")
        super()._load_from_state_dict(state_dict, prefix, *rest)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "old weight_norm", "script", "overriding"])
def test_modules_with_a_say_of_their_own(how: str) -> None:
    """Hooks and overridden methods are heard on both ways, and the module computes the same afterwards."""
    module, other = make_hooked(how), scrambled(make_hooked(how))
    saved = save({"model": module})
    load({"model": other}, saved)
    if how == "overriding":
        assert (other.count, frozen(other.half)) == (1, frozen(module.weight.detach() / 2))
        return
    assert frozen(other.state_dict()) == frozen(module.state_dict())
    x = torch.rand(2, 3)
    assert frozen(module(x)) == frozen(other(x))


def test_averaged_models() -> None:
    """EMA and SWA models keep their own ``module.`` and their count, beside the model that they average."""
    for average in (None, get_ema_multi_avg_fn(0.9)):
        model = nested()
        ema = AveragedModel(model, multi_avg_fn=average, use_buffers=average is not None)
        for _ in range(2):
            scrambled(model)
            ema.update_parameters(model)
        update_bn([torch.rand(4, 3) for _ in range(2)], ema)
        saved = save({"model": model, "ema": ema})
        assert "ema/module.0.weight" in saved.data
        other = nested()
        other_ema = AveragedModel(other, multi_avg_fn=average)
        load({"model": other, "ema": other_ema}, saved)
        assert frozen(other_ema.state_dict()) == frozen(ema.state_dict())
        assert int(other_ema.n_averaged) == 2


def test_lazy_and_meta_modules_are_refused_with_a_hint() -> None:
    """They have no bytes to save, and no place to restore into."""
    with pytest.raises(UnsupportedState, match="Run one batch") as refusal:
        capture({"model": nn.Sequential(nn.LazyLinear(2))}, rng=False)
    assert refusal.value.path == "model.0.weight"
    with pytest.raises(UnsupportedState, match="to_empty"):
        capture({"model": nn.Linear(2, 2, device="meta")}, rng=False)
    saved = save({"model": nn.Linear(2, 2)})
    with pytest.raises(UnsupportedState, match="to_empty"):
        begin({"model": nn.Linear(2, 2, device="meta")}, saved)
    lazy = nn.LazyLinear(2)
    lazy(torch.ones(1, 2))
    load({"model": lazy}, saved)


def test_names_that_only_one_side_has() -> None:
    """Strict: an error that names them all. Not strict: one warning, and the rest is restored."""
    saved = save({"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))})
    live = scrambled(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)))
    before = frozen(live.state_dict())
    with pytest.raises(StateMismatch) as mismatch:
        load({"model": live}, saved)
    assert mismatch.value.differences == (
        "model: 1.bias is expected, and not in the checkpoint",
        "model: 0.bias is in the checkpoint, and not expected",
    )
    assert frozen(live.state_dict()) == before
    with pytest.warns(UserWarning, match=r"0\.bias is in the checkpoint") as warned:
        load({"model": live}, saved, strict=False)
    assert len(warned) == 1
    assert frozen(live[0].weight) != before["0.weight"]  # type: ignore[index]


def test_a_renamed_prefix_and_another_size_are_guessed() -> None:
    """The two commonest causes are named; a long list is cut, but complete in the attribute."""
    saved = save({"model": nn.ModuleDict({"backbone": nn.Linear(2, 2)})})
    with pytest.raises(StateMismatch, match=r"names of the checkpoint begin with 'backbone\.'"):
        begin({"model": nn.Linear(2, 2)}, saved)
    saved = save({"model": nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))})
    with pytest.raises(StateMismatch, match="built with other sizes") as mismatch:
        begin({"model": nn.Sequential(*(nn.Linear(3, 2) for _ in range(30)))}, saved, strict=False)
    message, differences = str(mismatch.value), mismatch.value.differences
    assert "… and 20 more" in message
    assert len(differences) == 40
    assert "model: 0.weight: expected float32 [2, 3], found float32 [2, 2] in the checkpoint" in differences


def test_a_dtype_is_not_converted() -> None:
    """An fp32 checkpoint does not go into a bf16 model in silence."""
    with pytest.raises(StateMismatch, match=r"expected bfloat16 \[2, 2\], found float32"):
        begin({"model": nn.Linear(2, 2).bfloat16()}, save({"model": nn.Linear(2, 2)}), strict=False)


def test_components_of_one_side_and_other_kinds() -> None:
    """A component too many or too few, or of another kind, is a difference; ``only`` leaves others alone."""
    saved = save({"model": nn.Linear(2, 2), "count": 3, "old": [1]})
    live = {"model": scrambled(nn.Linear(2, 2)), "count": [1], "new": 4}
    with pytest.raises(StateMismatch) as mismatch:
        begin(live, saved)
    assert len(mismatch.value.differences) == 3
    assert "expected a component of kind 'container' (list), found 'value'" in str(mismatch.value)
    load(live, saved, only=("model",))
    with pytest.raises(ValueError, match=r"\['nope'\] names no component; there are model, count, new, old"):
        begin(live, saved, only=("model", "nope"))
    with pytest.warns(UserWarning, match="old: the checkpoint has"):
        assert load({"model": live["model"], "count": 0, "new": 1}, saved, strict=False) == {"count": 3}


def test_values_that_do_not_belong_to_their_kind_are_refused() -> None:
    """A manifest whose values point at foreign or absent tensors, or are no document, is a FormatError."""
    saved = save({"model": nn.Linear(2, 2), "w": torch.ones(2, 2)})
    good = bytes(saved.manifest.components["model"].values)
    for values in (
        good.replace(b"model/weight", b"w/value"),
        good.replace(b"model/weight", b"model/absent"),
        b'{"state":[]}',
        b"[]",
        b'{"state":{"entries":{}},"more":1}',
    ):
        components = {**saved.manifest.components, "model": Component(kind="module", values=msgspec.Raw(values))}
        broken = msgspec.structs.replace(saved.manifest, components=components)
        with pytest.raises(FormatError):
            begin({"model": nn.Linear(2, 2), "w": torch.ones(2, 2)}, type(saved)(broken, saved.data, saved.captured))


def test_restoring_works_whatever_grad_mode_is_on() -> None:
    """Under inference mode too, new tensors are ordinary ones and training can go on."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with torch.inference_mode():
        saved = save({"model": model, "optimizer": optimizer})
        other = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    resumed = torch.optim.Adam(other.parameters())
    with torch.inference_mode():
        restoration = begin({"model": other, "optimizer": resumed}, saved)
        fill(restoration, saved)
        restoration.finish()
    other(torch.ones(1, 2)).sum().backward()
    resumed.step()
    optimizer.step()
    assert all(not value.is_inference() for state in resumed.state.values() for value in state.values())
