"""Safetensors, plain and sharded: both directions, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign_states import Run, assert_same, random_tensor, restored

from ckptman import CheckpointManager
from ckptman.convert import export_checkpoint, import_checkpoint
from ckptman.convert.safetensors_file import TORCH_NAMES
from ckptman.errors import CheckpointNotFound, FormatError
from ckptman.format.dtypes import DTYPES


def test_every_dtype_of_the_library_makes_the_round_trip(tmp_path: Path) -> None:
    """What safetensors itself writes comes in; what goes out safetensors itself reads; the same bits."""
    generator = torch.Generator().manual_seed(0)
    known = {str(dtype).removeprefix("torch.") for dtype in safetensors.torch._TYPES.values()}
    assert len(known) >= 16
    assert known <= set(TORCH_NAMES.values())
    tensors = {
        f"{dtype}.{len(shape)}": random_tensor(dtype, shape, generator)
        for dtype in sorted(known)
        for shape in ((2, 3), (), (0, 4))
    }
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt"})
    imported = import_checkpoint(tmp_path / "root", tmp_path / "in.safetensors", step=1)
    assert imported.kinds == {"model": "module"}
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out.safetensors", to="safetensors")
    out = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert_same({name: tensors[name] for name in sorted(tensors)}, {name: out[name] for name in sorted(out)})


def test_a_whole_checkpoint_makes_the_round_trip(tmp_path: Path) -> None:
    """Every kind of component, every dtype, values, ties and sparse tensors: through one plain file and back."""
    run = Run()
    run.train(0, 2)
    generator = torch.Generator().manual_seed(0)
    rest: dict[str, object] = {
        "odd": {dtype: random_tensor(dtype, (3,), generator) for dtype in DTYPES if hasattr(torch, dtype)},
        "sparse": {"s": torch.eye(3).to_sparse(), "big": np.arange(5000)},
        "path": Path("a/b"),
        "note": "x",
    }
    with CheckpointManager(tmp_path / "root", {**run.state, **rest}) as manager:
        manager.save(2, block=True)
    done = export_checkpoint(tmp_path / "root", "latest", tmp_path / "all.safetensors", to="safetensors")
    assert done.nbytes == (tmp_path / "all.safetensors").stat().st_size
    names = safetensors.torch.load_file(tmp_path / "all.safetensors").keys()
    assert "model/first.weight" in names
    assert "model/second.weight" not in names  # tied

    imported = import_checkpoint(tmp_path / "again", tmp_path / "all.safetensors")
    assert imported.checkpoint.step == 2
    losses = run.train(2, 4)
    other = Run(seed=1)
    fresh: dict[str, object] = {"odd": {}, "sparse": {}, "path": None, "note": None}
    with CheckpointManager(tmp_path / "again", {**other.state, **fresh}) as manager:
        found = manager.restore()
    assert found is not None
    assert (found.values["path"], found.values["note"]) == (Path("a/b"), "x")
    assert_same(fresh["odd"], rest["odd"])
    assert torch.equal(fresh["sparse"]["s"].to_dense(), torch.eye(3))  # type: ignore[index]
    assert np.array_equal(fresh["sparse"]["big"], np.arange(5000))  # type: ignore[index]
    assert other.train(2, 4) == losses


def test_one_component_has_its_own_names(tmp_path: Path) -> None:
    """The weights alone are what any tool expects of a file of weights."""
    run = Run()
    with CheckpointManager(tmp_path / "root", run.state) as manager:
        manager.save(0, block=True)
    export_checkpoint(tmp_path / "root", 0, tmp_path / "m.safetensors", to="safetensors", components=["model"])
    out = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert_same(out["first.weight"], run.model.first.weight.detach())
    with pytest.raises(CheckpointNotFound, match="no component ema"):
        export_checkpoint(tmp_path / "root", 0, tmp_path / "x.safetensors", to="safetensors", components=["ema"])
    again = Run(seed=1)
    import_checkpoint(tmp_path / "again", tmp_path / "m.safetensors")
    restored(tmp_path / "again", {"model": again.model})
    assert_same(run.model.state_dict(), again.model.state_dict())


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    tensors = {f"w{index}": torch.full((4,), float(index)) for index in range(4)}
    weights = {}
    for index, name in enumerate(tensors):
        shard = f"model-{index // 2 + 1:05d}-of-00002.safetensors"
        weights[name] = shard
    for shard in set(weights.values()):
        safetensors.torch.save_file({n: tensors[n] for n, s in weights.items() if s == shard}, folder / shard)
    index = {"metadata": {"total_size": 64}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_shards_behind_an_index_are_one_module(tmp_path: Path) -> None:
    """All tensors of all shards, in the order of the index."""
    tensors = sharded(tmp_path / "hf")
    import_checkpoint(tmp_path / "root", tmp_path / "hf" / "model.safetensors.index.json", step=1)
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out.safetensors", to="safetensors")
    assert_same(safetensors.torch.load_file(tmp_path / "out.safetensors"), tensors)


def test_an_index_is_a_border(tmp_path: Path) -> None:
    """A missing shard, a missing tensor, a path out of the folder, nonsense: refused, and the root untouched."""
    sharded(tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for weights, match in [
        ({**whole["weight_map"], "w9": "model-00001-of-00002.safetensors"}, "lacks 'w9'"),
        ({**whole["weight_map"], "w9": "../x.safetensors"}, "not the name"),
        ({**whole["weight_map"], "w9": "..\\x.safetensors"}, "not the name"),
        ({**whole["weight_map"], "w9": "model-00003-of-00003.safetensors"}, "missing"),
        ([1], "no index"),
    ]:
        index.write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(FormatError, match=match):
            import_checkpoint(tmp_path / "root", index, step=1)
    assert not (tmp_path / "root").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Cut off anywhere, an impossible header, metadata that we did not write: our error, naming the file."""
    with CheckpointManager(tmp_path / "good", {"w": torch.ones(3), "n": 1}, rng=False) as manager:
        manager.save(1, block=True)
    export_checkpoint(tmp_path / "good", 1, tmp_path / "in.safetensors", to="safetensors")
    data = (tmp_path / "in.safetensors").read_bytes()
    for stop in range(0, len(data), 13):
        (tmp_path / "in.safetensors").write_bytes(data[:stop])
        with pytest.raises(FormatError, match=r"in\.safetensors"):
            import_checkpoint(tmp_path / "root", tmp_path / "in.safetensors", step=1)
    for old, new in [
        (b'\\"kind\\":\\"tensor\\"', b'\\"kind\\":\\"python\\"'),
        (b'\\"w/value\\"', b'\\"x/value\\"'),
        (b'\\"format\\":1', b'\\"format\\":2'),
    ]:
        assert old in data
        (tmp_path / "in.safetensors").write_bytes(data.replace(old, new))
        with pytest.raises(FormatError):
            import_checkpoint(tmp_path / "root", tmp_path / "in.safetensors", step=1)
    assert not (tmp_path / "root").exists()


def test_the_caller_may_say_what_a_component_is(tmp_path: Path) -> None:
    """A dict of tensors that is no module goes back into a dict."""
    torch.save({"ema": {"w": torch.ones(2)}, "n": 1}, tmp_path / "in.pt")
    import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1, kinds={"ema": "container"})
    ema = {"w": torch.zeros(2)}
    restored(tmp_path / "root", {"ema": ema, "n": 0})
    assert_same(ema, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="no such component"):
        import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=2, kinds={"emma": "container"})
    with pytest.raises(ValueError, match="cannot be a component of kind"):
        import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=2, kinds={"n": "optimizer"})


def test_a_file_is_known_by_its_beginning(tmp_path: Path) -> None:
    """Whatever it is called: a name of the user's own is no reason to take it for a file of ``torch.save``."""
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "weights.st")
    assert import_checkpoint(tmp_path / "root", tmp_path / "weights.st", step=1).format == "safetensors"
    for number, data in enumerate((b"", b"{", bytes(8), b"\xff" * 8 + b"{}", (99).to_bytes(8, "little") + b"{")):
        (tmp_path / f"{number}.st").write_bytes(data)
        with pytest.raises(FormatError, match=r"torch\.save"):
            import_checkpoint(tmp_path / "root", tmp_path / f"{number}.st", step=2)
