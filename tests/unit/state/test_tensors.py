from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from state_roundtrip import begin, frozen, load, save
from torch import nn

from ckptman.errors import FormatError, StateMismatch, UnsupportedState
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import Component
from ckptman.state.capture import capture
from ckptman.state.kinds import check_state
from ckptman.state.tensors import as_bytes, dtype_name, dtype_of, overwrite_part

PRESENT = [name for name in DTYPES if isinstance(getattr(torch, name, None), torch.dtype)]


def of_dtype(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random bits (of bools: zeros and ones) as a tensor."""
    generator = torch.Generator().manual_seed(seed)
    size = (*shape[:-1], shape[-1] * DTYPES[name].itemsize)
    raw = torch.randint(0, 2 if name == "bool" else 256, size, generator=generator, dtype=torch.uint8)
    return raw.view(getattr(torch, name))


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(as_bytes(tensor))


def test_every_dtype_of_the_format_is_there() -> None:
    """This torch has all element types of the format, and they translate both ways."""
    assert len(PRESENT) == len(DTYPES) == 41
    assert all(dtype_name(dtype_of(name)) == name for name in PRESENT)
    with pytest.raises(UnsupportedState):
        dtype_name(torch.qint8)
    with pytest.raises(UnsupportedState):
        dtype_of("float3")


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", PRESENT)
def test_every_dtype_comes_back_bit_for_bit(name: str) -> None:
    """As a component, in a dict, as a strided view, with no element at all; the bytes are shared, not copied."""
    one = of_dtype(name, 3, 4)
    state = {"t": one, "d": {"view": one[:, 1:3] if name not in ("int4",) else one, "empty": one[:0]}}
    saved = save(state)
    live: dict[str, Any] = {"t": of_dtype(name, 3, 4, seed=1), "d": {"view": None, "empty": None}}
    load(live, saved)
    assert bits(live["t"]) == bits(one)
    assert live["d"]["view"].dtype == one.dtype
    assert saved.data["d/view"] == bits(live["d"]["view"])
    assert live["d"]["empty"].shape == (0, 4)
    as_bytes(one)[0] = 1
    assert bits(one)[0] == 1


@pytest.mark.parametrize("dtype", ["int3", "uint5", "float32"])
def test_a_live_view_is_written_into(dtype: str) -> None:
    """A live tensor that is every other column of a larger one is filled, and nothing beside it."""
    whole = of_dtype(dtype, 4, 6)
    part = whole.view(torch.uint8).view(4, 6, -1)[:, ::2] if dtype != "float32" else whole[:, ::2]
    live = part.squeeze(-1).view(whole.dtype) if dtype != "float32" else part
    before = as_bytes(whole).tobytes()
    source = of_dtype(dtype, 4, 3, seed=5)
    load({"t": live}, save({"t": source}))
    assert frozen_bits(live) == bits(source)
    untouched = torch.frombuffer(bytearray(before), dtype=torch.uint8).view(4, 6, -1)[:, 1::2]
    assert torch.equal(whole.view(torch.uint8).view(4, 6, -1)[:, 1::2], untouched)


def frozen_bits(tensor: torch.Tensor) -> bytes:
    size = tensor.element_size()
    return bytes(as_bytes(tensor.view(torch.uint8).contiguous() if size == 1 else tensor.contiguous()))


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "conjugate": lambda: torch.randn(2, 3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(2, 3, dtype=torch.complex64).conj().imag,
    "transposed": lambda: torch.randn(3, 4).T,
    "sliced": lambda: torch.randn(6, 6)[::2, 1:4],
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "window": lambda: torch.arange(6.0).unfold(0, 3, 1),
    "0-dim": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0, 3),
    "Parameter": lambda: nn.Parameter(torch.randn(2)),
    "frozen Parameter": lambda: nn.Parameter(torch.randn(2), requires_grad=False),
    "Buffer": lambda: nn.Buffer(torch.randn(2)),
    "leaf with grad": lambda: torch.randn(2, requires_grad=True),
    "result with grad": lambda: torch.randn(2, requires_grad=True) * 2,
    "channels last": lambda: torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "coo": lambda: torch.eye(3).to_sparse(),
    "coo uncoalesced": lambda: torch.sparse_coo_tensor([[0, 0, 2]], torch.tensor([1.0, 2.0, 3.0]), (4,)),
    "coo hybrid": lambda: torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (4, 3)),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "sparse Parameter": lambda: nn.Parameter(torch.eye(3).to_sparse()),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["component", "dict", "new", "module", "inference"])
def test_every_kind_of_tensor_comes_back(kind: str, place: str) -> None:
    """Equal, in place where something is there; sparse ones with their layout and coalesced flag."""
    torch.manual_seed(0)
    source = KINDS[kind]()
    before = source.detach().clone()
    torch.manual_seed(1)
    with torch.inference_mode(place == "inference" and "grad" not in kind):
        live = KINDS[kind]()
    if place in ("component", "inference"):
        state: Any = {"t": live}
        load(state, save({"t": source}))
        result = live
    elif place == "module":
        module, other = nn.Module(), nn.Module()
        if isinstance(source, nn.Parameter):
            module.t, other.t = source, live
        else:
            module.register_buffer("t", source)
            other.register_buffer("t", live)
        load({"m": other}, save({"m": module}))
        assert other.t is live
        result = live
    else:
        state = {"d": {"a": [live if place == "dict" else None]}}
        load(state, save({"d": {"a": [source]}}))
        result = state["d"]["a"][0]
        assert (result is live) == (place == "dict")
        assert type(result) is type(source)
        assert result.requires_grad == source.requires_grad
    assert result.layout == source.layout
    assert result.dtype == source.dtype
    with torch.inference_mode(result.is_inference()):
        assert frozen(result) == frozen(before) == frozen(source)
    if "coo" in kind:
        assert result.is_coalesced() == source.is_coalesced()
        assert torch.equal(result.detach()._indices(), source.detach()._indices())


def test_the_sweep_of_kinds_is_complete() -> None:
    """As many kinds as are promised."""
    assert len(KINDS) == 22


def test_capturing_shares_memory_and_changes_no_version() -> None:
    """A leaf is a view of the live tensor; neither its version nor its grad graph moves."""
    weight = nn.Parameter(torch.ones(3))
    version = weight._version
    captured = capture({"w": weight, "d": {"x": weight}}, rng=True)
    (leaf,) = captured["w"].leaves
    assert leaf.tensor.data_ptr() == weight.data_ptr()
    assert not leaf.tensor.requires_grad
    assert weight._version == version
    assert list(captured) == ["w", "d", "rng"]


class Pair(torch.Tensor):
    """A subclass made of two tensors, in the way of torch's own tests."""

    one: torch.Tensor
    two: torch.Tensor
    scale: object

    @staticmethod
    def __new__(cls, one: torch.Tensor, two: torch.Tensor, scale: object = 1) -> Pair:
        return torch.Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype)

    def __init__(self, one: torch.Tensor, two: torch.Tensor, scale: object = 1) -> None:
        self.one, self.two, self.scale = one, two, scale

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["one", "two"], {"scale": self.scale, "dtype": self.dtype}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Pair(args[0].one, args[0].two, args[0].scale)
        raise NotImplementedError(func)


class Odd(torch.Tensor):
    """A subclass that says nothing of itself."""


def test_subclasses_are_filled_where_they_live() -> None:
    """Through their own flattening, nested too; another class or metadata does not fit; elsewhere they are refused."""

    def pair(fill: float, scale: object = 1) -> Pair:
        return Pair(torch.full((2,), fill), Pair(torch.full((2,), fill + 1), torch.zeros(3), scale))

    module, other = nn.Module(), nn.Module()
    module.w = nn.Parameter(pair(1.0), requires_grad=False)
    other.w = nn.Parameter(pair(5.0), requires_grad=False)
    saved = save({"m": module, "t": pair(2.0)})
    assert sorted(saved.data) == [
        f"{c}/{n}" for c, w in (("m", "w"), ("t", "value")) for n in (f"{w}/one", f"{w}/two/one", f"{w}/two/two")
    ]
    live = pair(9.0)
    load({"m": other, "t": live}, saved)
    assert other.w.one.tolist() == [1, 1]
    assert other.w.two.one.tolist() == [2, 2]
    assert live.two.one.tolist() == [3, 3]
    with pytest.raises(StateMismatch, match="Pair"):
        begin({"m": other, "t": pair(0.0, scale=2)}, saved)
    with pytest.raises(StateMismatch, match="Pair"):
        begin({"m": other, "t": torch.ones(2)}, saved)
    with pytest.raises(UnsupportedState, match=r"subclass of torch\.Tensor") as refusal:
        capture({"d": {"x": [pair(1.0)]}}, rng=False)
    assert refusal.value.path == "d['x'][0]"


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "int_repr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "unbind"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "unbind"),
    "meta": (lambda: torch.empty(2, device="meta"), "to_empty"),
    "fake": (lambda: torch._subclasses.FakeTensorMode().from_tensor(torch.ones(2)), "FakeTensorMode"),
    "odd subclass": (lambda: torch.ones(2).as_subclass(Odd), "as_subclass"),
    "mkldnn": (lambda: torch.ones(2, 2).to_mkldnn(), "to_dense"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_bytes_is_refused_with_path_and_hint(kind: str) -> None:
    """As a component, in a module and in a dict; nothing else of the state is looked at."""
    make, hint = REFUSED[kind]
    module = nn.Module()
    module.register_buffer("b", make())
    for state, path in (({"x": make()}, "x"), ({"x": module}, "x.b"), ({"x": {"a": (1, make())}}, "x['a'][1]")):
        with pytest.raises(UnsupportedState, match=hint) as refusal:
            capture(state, rng=False)
        assert refusal.value.path == path


def test_forged_notes_are_refused() -> None:
    """Notes that claim other parts, another layout, or a subclass where none can be made, make a FormatError."""
    saved = save({"d": {"s": torch.eye(2).to_sparse()}})
    values = bytes(saved.manifest.components["d"].values)
    assert b'"layout":"sparse_coo"' in values
    for old, new in (
        (b'"sparse_coo"', b'"sparse_csr"'),
        (b'"sparse_coo"', b'"subclass"'),
        (b'"sparse_coo"', b'"strided"'),
        (b'"sparse_coo"', b'"odd"'),
        (b'"d/s/values"', b'"d/absent"'),
        (b'"coalesced"', b'"other"'),
    ):
        forged = Component(kind="container", values=msgspec.Raw(values.replace(old, new)))
        manifest = msgspec.structs.replace(saved.manifest, components={"d": forged})
        with pytest.raises(FormatError):
            load({"d": {}}, type(saved)(manifest, saved.data, saved.captured))


def test_indices_out_of_range_are_refused() -> None:
    """The indices of a sparse tensor come from a file: they are checked before anything reads through them."""
    saved = save({"d": {"s": torch.eye(2).to_sparse()}})
    data = {**saved.data, "d/s/indices": (99).to_bytes(8, "little") * 4}
    with pytest.raises(FormatError, match="do not make a sparse_coo tensor"):
        load({"d": {}}, type(saved)(saved.manifest, data, saved.captured))


def test_a_dtensor_tells_its_box_and_a_partial_sum_is_refused(tmp_path: Any) -> None:
    """What a process holds of a DTensor is a box of the whole; a sum that is not made yet is none."""
    from torch.distributed.tensor import DTensor, Partial, Shard, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensor = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
        (leaf,) = capture({"x": tensor}, rng=False)["x"].leaves
        assert (leaf.offset, leaf.shape, tuple(leaf.tensor.shape)) == ((0, 0), (2, 3), (2, 3))
        with pytest.raises(UnsupportedState, match="artial"):
            capture({"x": DTensor.from_local(torch.ones(2), mesh, [Partial()])}, rng=False)
    finally:
        torch.distributed.destroy_process_group()


def test_the_same_tensor_in_two_components() -> None:
    """A shadow that is the model's own weight stays that, and is stored for both."""
    model = nn.Linear(2, 2)
    saved = save({"model": model, "shadow": {"w": model.weight}})
    assert {"model/weight", "shadow/w"} <= set(saved.data)
    other = nn.Linear(2, 2)
    shadow = {"w": other.weight}
    load({"model": other, "shadow": shadow}, saved)
    assert shadow["w"] is other.weight
    assert frozen(other.weight) == frozen(model.weight)


def test_as_bytes_takes_only_what_has_its_bytes_in_order() -> None:
    """A transposed or conjugate tensor would give other bytes than its values: refused."""
    for tensor in (torch.ones(2, 3).T, torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, device="meta")):
        with pytest.raises(ValueError, match="contiguous"):
            as_bytes(tensor)
    assert as_bytes(torch.empty(0, 2)).nbytes == 0
    assert as_bytes(torch.tensor(1, dtype=torch.int16)).tobytes() == b"\1\0"
    assert as_bytes(nn.Parameter(torch.ones(2))).format == "B"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save({"t": torch.ones(2)})


def test_names_of_components() -> None:
    """Unfit, reserved and clashing names are refused before anything else."""
    assert list(check_state({"b": 1, "a": 2})) == ["b", "a"]
    assert check_state({"rng": 1}, rng=False) == {"rng": 1}
    for state in ({"": 1}, {"a/b": 1}, {"RNG": 1}, {"a": 1, "A": 2}):
        with pytest.raises(ValueError):
            check_state(state)
    for wrong in ([1], {1: 2}, None):
        with pytest.raises(TypeError):
            check_state(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.complex128, torch.bool], ids=str)
@pytest.mark.parametrize(
    ("shape", "order"), [((7,), (0,)), ((5, 6), (1, 0)), ((3, 4, 5), (2, 0, 1)), ((2, 3, 4, 5), (0, 3, 1, 2))], ids=str
)
def test_a_tensor_is_filled_piece_by_piece_wherever_the_pieces_are_cut(
    shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Turned ones and ones with gaps, from pieces of any number of elements: exactly the row-major bytes."""
    gaps = torch.zeros([2 * size for size in shape]).to(dtype)[(slice(None, None, 2),) * len(shape)]
    for live in (torch.zeros(shape).to(dtype).permute(order), gaps.permute(order)):
        expected = torch.randn(live.shape).mul(9).to(dtype).contiguous()
        data, itemsize = expected.view(-1).view(torch.uint8), expected.element_size()
        for count in (1, 2, 3, 5, 7, 11, 1000):
            live.zero_()
            for start in range(0, len(data), count * itemsize):
                overwrite_part(live, start, data[start : start + count * itemsize])
            assert torch.equal(live, expected)
