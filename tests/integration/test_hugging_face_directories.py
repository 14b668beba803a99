"""Directories of a plain Trainer: the last complete one is found, whatever a kill or a power loss left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from crash.accidents import in_child
from hugging_face_job import Job, gpt, lora
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from ckptman.integrations.transformers import find_last_checkpoint
from ckptman.integrations.transformers.directory import faults

Damage = Callable[[Path], None]

DAMAGES: dict[str, Damage] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by two bytes": lambda path: os.truncate(path, path.stat().st_size - 2),
    "all zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a plain Trainer wrote at steps 2 and 4: a whole model, an adapter, and a model in shards."""
    home = tmp_path_factory.mktemp("outputs")
    for name, model in (("whole", gpt), ("adapter", lora)):
        job = Job(output=str(home / name), model=model, trainer=Trainer, options={"max_steps": 4})
        job.finish(None)
    shutil.copytree(home / "whole", home / "sharded")
    for step in (2, 4):
        folder = home / "sharded" / f"checkpoint-{step}"
        (folder / "model.safetensors").unlink()
        in_child(lambda tell, folder=folder: gpt().save_pretrained(folder, max_shard_size="8KB"))
    return home


def needed(folder: Path) -> list[str]:
    """The files of a directory that a resume needs."""
    names = {path.name for path in folder.iterdir()}
    return sorted(names - {"training_args.bin", "config.json", "generation_config.json", "README.md"})


@pytest.mark.parametrize("kind", ["whole", "adapter", "sharded"])
def test_no_damage_to_any_file_goes_unnoticed(kind: str, outputs: Path, tmp_path: Path) -> None:
    """With one file missing, empty, cut off or zeroed the older checkpoint is found; ``get_last_checkpoint`` errs."""
    output = tmp_path / "output"
    shutil.copytree(outputs / kind, output)
    last, older = output / "checkpoint-4", output / "checkpoint-2"
    assert find_last_checkpoint(output) == get_last_checkpoint(output) == str(last)
    files = needed(last)
    assert len(files) >= {"whole": 5, "adapter": 6, "sharded": 8}[kind], files
    for name in files:
        for what, damage in DAMAGES.items():
            before = (last / name).read_bytes()
            damage(last / name)
            assert find_last_checkpoint(output) == str(older), f"{name} {what}"
            assert any(name.partition(".")[0] in fault or "no model" in fault for fault in faults(last)), faults(last)
            assert get_last_checkpoint(output) == str(last)
            (last / name).write_bytes(before)
    assert find_last_checkpoint(output) == str(last)


def test_what_is_no_checkpoint_is_passed_over(outputs: Path, tmp_path: Path) -> None:
    """Other names, files of that name, and what the Trainer itself marked as incomplete; numbers count as numbers."""
    output = tmp_path / "output"
    assert find_last_checkpoint(output) is None
    output.mkdir()
    assert find_last_checkpoint(output) is None
    shutil.copytree(outputs / "whole" / "checkpoint-2", output / "checkpoint-2")
    shutil.copytree(outputs / "whole" / "checkpoint-4", output / "checkpoint-10")
    shutil.copytree(outputs / "whole" / "checkpoint-4", output / "checkpoint-11.tmp")
    (output / "checkpoint-12").write_text("not a directory")
    (output / "checkpoint-13").mkdir()
    assert find_last_checkpoint(output) == str(output / "checkpoint-10")
    (output / "checkpoint-10" / "checkpoint-is-incomplete.txt").write_text("")
    assert find_last_checkpoint(output) == str(output / "checkpoint-2")
    with pytest.raises(NotADirectoryError):
        find_last_checkpoint(output / "checkpoint-12")


def test_the_random_state_of_every_rank_must_be_there(outputs: Path, tmp_path: Path) -> None:
    """A gap between the ranks is noticed; a missing last rank only where the number of ranks is told."""
    last = tmp_path / "checkpoint-4"
    shutil.copytree(outputs / "whole" / "checkpoint-4", last)
    state = (last / "rng_state.pth").read_bytes()
    (last / "rng_state.pth").unlink()
    for rank in (0, 1, 2):
        (last / f"rng_state_{rank}.pth").write_bytes(state)
    assert find_last_checkpoint(tmp_path) == find_last_checkpoint(tmp_path, world_size=3) == str(last)
    (last / "rng_state_1.pth").unlink()
    assert find_last_checkpoint(tmp_path) is None
    (last / "rng_state_1.pth").write_bytes(state)
    (last / "rng_state_2.pth").unlink()
    assert find_last_checkpoint(tmp_path, world_size=3) is None


def test_paths_of_any_system_relative_and_absolute(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backslashes separate on POSIX too, unless a folder's name has them; Windows paths in the files do not matter."""
    output = tmp_path / "runs" / "a"
    shutil.copytree(outputs / "sharded", output)
    monkeypatch.chdir(tmp_path)
    assert find_last_checkpoint("runs/a") == os.path.join("runs/a", "checkpoint-4")
    assert find_last_checkpoint(r"runs\a") == os.path.join("runs/a", "checkpoint-4")
    assert find_last_checkpoint(str(output).replace("/", "\\")) == str(output / "checkpoint-4")

    state = output / "checkpoint-4" / "trainer_state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "best_model_checkpoint": "C:\\runs\\a\\checkpoint-4"}))
    assert find_last_checkpoint("runs/a") == os.path.join("runs/a", "checkpoint-4")

    if os.name == "posix":
        shutil.copytree(outputs / "whole", tmp_path / r"runs\a")
        assert find_last_checkpoint(r"runs\a") == os.path.join(r"runs\a", "checkpoint-4")


def test_looking_imports_neither_torch_nor_transformers(outputs: Path) -> None:
    """A launcher can look before it starts anything; and nothing is unpickled, for there is nothing that could."""
    script = (
        "import sys; from ckptman.integrations.transformers import find_last_checkpoint\n"
        "print(find_last_checkpoint(sys.argv[1]))\n"
        "assert not {'torch', 'transformers', 'pickle'} & set(sys.modules), 'imported'\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(outputs / "whole")], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(outputs / "whole" / "checkpoint-4")
