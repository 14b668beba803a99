"""Directories of torch.distributed.checkpoint: written by it and imported, exported and loaded by it."""

import multiprocessing
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from foreign_states import Run, assert_same, random_tensor, restored
from test_torch_files import saveable
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ckptman import CheckpointManager
from ckptman.convert import export_checkpoint, import_checkpoint
from ckptman.errors import FormatError, UnsupportedState


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def saved(run: Run, folder: Path, **more: Any) -> Path:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer, **more}, checkpoint_id=folder)
    return folder


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """What DCP saved of a run continues in ckptman; the optimizer is known by name."""
    run = Run()
    run.train(0, 3)
    more = {"scheduler": run.scheduler.state_dict(), "nested": {"l": [1, {"t": torch.ones(2)}], "x": {}}}
    saved(run, tmp_path / "in", **more)
    losses = run.train(3, 6)
    imported = import_checkpoint(tmp_path / "root", tmp_path / "in", step=3)
    assert imported.kinds == {
        "model": "module", "optimizer": "optimizer", "scheduler": "stateful", "nested": "container",
    }  # fmt: skip
    again = Run(seed=1)
    nested: dict[str, Any] = {}
    restored(tmp_path / "root", {**again.state, "nested": nested})
    assert_same(nested, {"l": [1, {"t": torch.ones(2)}]})  # DCP itself drops empty dicts
    assert again.train(3, 6) == losses
    assert_same(run.model.state_dict(), again.model.state_dict())


def test_what_goes_out_dcp_loads(tmp_path: Path) -> None:
    """An export of a live run is loaded by DCP in place, and by its converter; and comes back the same."""
    run = Run()
    run.train(0, 3)
    with CheckpointManager(tmp_path / "root", {**run.state, "epoch": 3}, rng=False) as manager:
        manager.save(3, block=True)
    done = export_checkpoint(tmp_path / "root", 3, tmp_path / "out", to="dcp")
    assert done.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    losses = run.train(3, 6)

    again = Run(seed=1)
    model, optimizer = get_state_dict(again.model, again.optimizer)
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    dcp.load(state, checkpoint_id=tmp_path / "out")
    again.model.load_state_dict(state["model"])  # type: ignore[arg-type]
    torch.distributed.checkpoint.state_dict.set_optimizer_state_dict(
        again.model, again.optimizer, state["optimizer"]  # type: ignore[arg-type]
    )  # fmt: skip
    assert state["epoch"] == 3
    dcp_to_torch_save(tmp_path / "out", tmp_path / "flat.pt")
    flat = torch.load(tmp_path / "flat.pt", weights_only=False)
    again.scheduler.load_state_dict(flat["scheduler"])
    assert again.train(3, 6) == losses

    import_checkpoint(tmp_path / "back", tmp_path / "out", step=3)
    back = Run(seed=2)
    restored(tmp_path / "back", {**back.state, "epoch": 0})
    assert back.train(3, 6) == losses


def test_every_dtype_makes_the_round_trip(tmp_path: Path) -> None:
    """Each type that torch.save can write, of any shape, through DCP and back."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (), (2, 1, 2))
    tensors = {
        f"{dtype}.{len(shape)}": random_tensor(dtype, shape, generator)
        for dtype in saveable()
        for shape in shapes
        if not dtype.startswith(("bits", "float4"))  # on which DCP itself fails
    }
    assert len(tensors) >= 50
    dcp.save({"model": tensors}, checkpoint_id=tmp_path / "in")
    import_checkpoint(tmp_path / "root", tmp_path / "in", step=1)
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out", to="dcp")
    import_checkpoint(tmp_path / "back", tmp_path / "out", step=1)
    export_checkpoint(tmp_path / "back", 1, tmp_path / "out.pt", to="torch")
    out = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert_same({name: tensors[name] for name in sorted(tensors)}, {name: out[name] for name in sorted(out)})


def save_sharded(rank: int, folder: str) -> None:
    """One of two ranks that save tensors in pieces. Forked, so that torch need not be imported again."""
    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(35.0).reshape(7, 5)
    state = {
        "rows": distribute_tensor(whole, mesh, [Shard(0)]),
        "columns": distribute_tensor(whole.bfloat16(), mesh, [Shard(1)]),
        "short": distribute_tensor(whole[:1], mesh, [Shard(0)]),
        "copies": distribute_tensor(whole, mesh, [Replicate()]),
    }
    dcp.save({"model": state}, checkpoint_id=folder)
    dist.destroy_process_group()


def test_sharded_tensors_are_put_together(tmp_path: Path) -> None:
    """What two ranks wrote in pieces, by rows and by columns, is imported as whole tensors; a lost piece is missed."""
    folder = tmp_path / "in"
    forking = multiprocessing.get_context("fork")
    ranks = [forking.Process(target=save_sharded, args=(rank, str(folder))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    whole = torch.arange(35.0).reshape(7, 5)
    wanted = {"rows": whole, "columns": whole.bfloat16(), "short": whole[:1], "copies": whole}
    import_checkpoint(tmp_path / "root", folder, step=1)
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out.pt", to="torch")
    out = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert_same(wanted, {name: out[name] for name in wanted})
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(FormatError, match=r"__1_0\.distcp is missing"):
        import_checkpoint(tmp_path / "root", folder, step=2)


class Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def test_bombs_in_metadata_and_in_values_are_refused(tmp_path: Path) -> None:
    """Both the .metadata and every value are pickles: what they call is named, and not called."""
    saved(Run(), tmp_path / "in")
    ran = tmp_path / "ran"
    dcp.save({"x": Bomb(str(ran))}, checkpoint_id=tmp_path / "value")
    metadata = pickle.loads((tmp_path / "in" / ".metadata").read_bytes())
    metadata.planner_data["x"] = Bomb(str(ran))
    (tmp_path / "in" / ".metadata").write_bytes(pickle.dumps(metadata))
    for name in ("in", "value"):
        with pytest.raises(UnsupportedState, match=r"posix\.mkdir"):
            import_checkpoint(tmp_path / "root", tmp_path / name, step=1)
    assert not ran.exists()
    assert not (tmp_path / "root").exists()


def test_partial_and_lying_directories_are_refused(tmp_path: Path) -> None:
    """No metadata, no data, data cut off, a place elsewhere, another type than announced: an error, nothing more."""
    whole = saved(Run(), tmp_path / "whole")
    metadata = (whole / ".metadata").read_bytes()

    def lie(change: Any) -> bytes:
        found = pickle.loads(metadata)
        change(found)
        return pickle.dumps(found)

    def elsewhere(found: Any) -> None:
        next(iter(found.storage_data.values())).relative_path = "../../etc/passwd"

    def retyped(found: Any) -> None:
        found.state_dict_metadata["model.first.weight"].properties.dtype = torch.float16

    def compressed(found: Any) -> None:
        next(iter(found.storage_data.values())).transform_descriptors = ["zstd"]

    def huge(found: Any) -> None:
        found.planner_data.update({name: (name, 900_000) for name in found.planner_data})

    def contradicting(found: Any) -> None:
        found.planner_data["model.first.weight"] = ("model", 3)

    data = (whole / "__0_0.distcp").read_bytes()
    for name, content, match in [
        (".metadata", None, "is missing"),
        (".metadata", metadata[:-100], "metadata"),
        (".metadata", b"", "metadata"),
        (".metadata", pickle.dumps({}), "no metadata of DCP"),
        ("__0_0.distcp", None, "is missing"),
        ("__0_0.distcp", data[: len(data) // 2], "distcp"),
        (".metadata", lie(elsewhere), "not the name of a file"),
        (".metadata", lie(retyped), "is not what"),
        (".metadata", lie(compressed), "zstd"),
        (".metadata", lie(huge), "describes lists"),
        (".metadata", lie(contradicting), "contradict|two values"),
    ]:
        folder = Path(shutil.copytree(whole, tmp_path / "in", dirs_exist_ok=True))
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(FormatError, match=match):
            import_checkpoint(tmp_path / "root", folder, step=1)
    assert not (tmp_path / "root").exists()
