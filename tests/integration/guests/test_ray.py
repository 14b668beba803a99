"""Ray Train: pointers, and a worker that is killed and restarted by Ray."""

import runpy
from pathlib import Path

import pytest
import torch
from killing import EXAMPLES, differing

from ckptman import CheckpointManager, FormatError, keep

pytest.importorskip("ray")


def pointing(folder: Path, root: str, step: int) -> object:
    from ray.train import Checkpoint

    from ckptman.integrations.ray import Pointer, write_pointer

    folder.mkdir()
    write_pointer(folder, Pointer(root=root, step=step))
    return Checkpoint.from_directory(str(folder))


def test_a_pointer_is_followed(tmp_path: Path) -> None:
    """What Ray hands over is restored, though newer ones exist; a dropped one is succeeded; another root is refused."""
    from ckptman.integrations.ray import pointer_of, restore

    weight = torch.zeros(3)
    with CheckpointManager(tmp_path / "root", {"weight": weight}, keep=keep.last(2)) as manager:
        for step in (1, 2, 3):
            weight.fill_(step)
            manager.save(step, block=True)
        second = pointing(tmp_path / "second", manager.root, 2)
        assert pointer_of(second).step == 2
        assert (restore(manager, second).step, weight.tolist()) == (2, [2.0] * 3)
        assert restore(manager, pointing(tmp_path / "first", manager.root, 1)).step == 3
        with pytest.raises(ValueError, match="open one there"):
            restore(manager, pointing(tmp_path / "other", "/elsewhere", 2))
    (tmp_path / "second" / "ckptman-pointer.json").write_text('{"root": "x", "step": 1, "format": 2}')
    with pytest.raises(FormatError, match="format 2"):
        pointer_of(second)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_goes_on_bit_identical(tmp_path: Path) -> None:
    """Ray restarts the worker that died of SIGKILL, and weights, moments, streams and losses end as without it."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
    try:
        run = runpy.run_path(str(EXAMPLES / "ray_run.py"))["run"]
        run(str(tmp_path / "control"), str(tmp_path / "ray-control"))
        result = run(str(tmp_path / "killed"), str(tmp_path / "ray-killed"), 11)
    finally:
        ray.shutdown()
    components = ["model", "optimizer", "losses", "rng"]
    assert differing(tmp_path / "control", {11: tmp_path / "killed"}, components) == {11: []}
    assert len(list((tmp_path / "killed").glob("step-*.w0002.*"))) == 3
    assert result.metrics["step"] == 20
