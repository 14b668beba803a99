"""Lightning's strategies that spread the model over ranks: killed runs of two processes, and reading them elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from killing import contents, kill_and_resume

pytest.importorskip("lightning")

from ckptman.integrations.documents import read

PROGRAM = str(Path(__file__).parent / "sharded_lightning.py")


def ended(root: Path) -> dict[str, object]:
    """How a run ended: everything that was saved, by all ranks, but for the folder in the paths of the callbacks."""
    found = contents(root, ["model", "optimizer", "document"])
    return {name: json.dumps(value).replace(str(root), "") for name, value in found.items()}


@pytest.mark.timeout(300)
def test_a_killed_run_with_fsdp_ends_bit_identical(tmp_path: Path) -> None:
    """Shards of weights and moments, each rank's losses and dropout, schedule, loops; and others read it whole."""
    control, killed = kill_and_resume(PROGRAM, tmp_path / "fsdp", [40], ranks=2)
    expected = ended(control)
    assert {"document", "document.rank-00001", "model/net.0.weight"} <= expected.keys()
    assert len(contents(control, ["model"])["model/net.0.weight"][2]) == 2, "each rank saved its shard"
    assert {kill: ended(root) for kill, root in killed.items()} == {40: expected}
    entry, document = read(str(control))
    assert entry.step == document["global_step"] == 15
    assert document["state_dict"]["net.0.weight"].shape == torch.Size([32, 16])
    assert len(document["losses"]) == 15


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_run_with_tensor_parallelism_ends_bit_identical(tmp_path: Path) -> None:
    """The same for layers split by columns and rows."""
    control, killed = kill_and_resume(PROGRAM, tmp_path / "tensor_parallel", [40], ranks=2)
    expected = ended(control)
    assert {kill: ended(root) for kill, root in killed.items()} == {40: expected}


@pytest.mark.timeout(300)
def test_a_killed_run_of_a_strategy_with_its_own_files_ends_bit_identical(tmp_path: Path) -> None:
    """What each rank's file held comes back to that rank; and no file is left beside the root."""
    control, killed = kill_and_resume(PROGRAM, tmp_path / "own_files", [40], ranks=2)
    expected = trained(control)
    assert len(expected) == 2
    assert {kill: trained(root) for kill, root in killed.items()} == {40: expected}
    assert not list(tmp_path.rglob(".ckptman-staged/*"))


def trained(root: Path) -> dict[str, object]:
    """The files with weights, moments and losses, by rank."""
    found = contents(root, ["files"])
    return {name: value for name, value in found.items() if "rank-" in name.partition("/")[2]}
