"""Directories that the real Trainer writes: imported, continued, exported, loaded by from_pretrained."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_states import assert_same

from ckptman import CheckpointManager
from ckptman.convert import export_checkpoint, import_checkpoint
from ckptman.errors import FormatError, StorageError, UnsupportedState

transformers = pytest.importorskip("transformers")


def build(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def trained(output: Path, steps: int, resume: Path | None = None) -> Any:
    """A Trainer after *steps* steps, with a checkpoint after each."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 64, (8,), generator=generator) for _ in range(16)]
    arguments = transformers.TrainingArguments(
        str(output), max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        logging_steps=1, disable_tqdm=True, save_total_limit=None, seed=3,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=build(), args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    before = os.environ.get("ACCELERATE_USE_CPU")
    transformers.logging.set_verbosity_error()
    yield
    if before is None:
        os.environ.pop("ACCELERATE_USE_CPU", None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 4 steps, and its output directory."""
    output = tmp_path_factory.mktemp("hf") / "out"
    return trained(output, 4), output


def live(trainer: Any) -> dict[str, Any]:
    """Objects as the Trainer makes them, from another seed."""
    model = build(seed=9)
    other = transformers.Trainer(model=model, args=trainer.args)
    other.create_optimizer_and_scheduler(4)
    return {"model": model, "optimizer": other.optimizer, "scheduler": other.lr_scheduler}


def test_a_genuine_checkpoint_restores_into_live_objects(run: Any, tmp_path: Path) -> None:
    """Weights, moments, schedule, random streams and the Trainer's state are what Hugging Face itself would load."""
    trainer, output = run
    folder = output / "checkpoint-2"
    imported = import_checkpoint(tmp_path / "root", folder)
    assert imported.checkpoint.step == 2
    assert imported.kinds == {
        "model": "module", "optimizer": "stateful", "scheduler": "stateful", "rng": "rng",
        "trainer_state": "container", "config": "container",
    }  # fmt: skip
    assert [sentence.partition(":")[0] for sentence in imported.left_out] == ["training_args.bin"]
    state = live(trainer)
    progress: dict[str, Any] = {}
    with CheckpointManager(tmp_path / "root", {**state, "trainer_state": progress, "config": {}}) as manager:
        manager.restore()  # strict: the tied head is no missing weight
    theirs = torch.load(folder / "rng_state.pth", weights_only=False)
    assert_same(torch.get_rng_state(), theirs["cpu"])
    reference = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert_same(state["model"].state_dict(), reference.state_dict())
    assert state["model"].lm_head.weight is state["model"].transformer.wte.weight
    assert_same(state["optimizer"].state_dict(), torch.load(folder / "optimizer.pt", weights_only=True))
    assert state["scheduler"].state_dict() == torch.load(folder / "scheduler.pt", weights_only=True)
    assert progress == json.loads((folder / "trainer_state.json").read_text())


def test_training_goes_on_bit_for_bit(run: Any, tmp_path: Path) -> None:
    """Steps 3 and 4, by hand from the imported step 2, end in the weights of the Trainer's own run."""
    trainer, output = run
    import_checkpoint(tmp_path / "root", output / "checkpoint-2")
    ends = []
    for source in ("ckptman", "torch"):
        state = live(trainer)
        if source == "ckptman":
            with CheckpointManager(tmp_path / "root", state) as manager:
                manager.restore(only=state)
        else:
            for name, file in (("optimizer", "optimizer.pt"), ("scheduler", "scheduler.pt")):
                state[name].load_state_dict(torch.load(output / "checkpoint-2" / file, weights_only=True))
            weights = transformers.GPT2LMHeadModel.from_pretrained(output / "checkpoint-2").state_dict()
            state["model"].load_state_dict(weights)
        state["model"].eval()  # no dropout
        for step in range(2):
            rows = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
            state["model"](input_ids=rows, labels=rows).loss.backward()
            state["optimizer"].step()
            state["scheduler"].step()
            state["optimizer"].zero_grad()
        ends.append({name: part.state_dict() for name, part in state.items()})
    assert_same(ends[0], ends[1])


@pytest.mark.parametrize("shard_nbytes", [5_000_000_000, 4000])
def test_what_goes_out_from_pretrained_loads(run: Any, tmp_path: Path, shard_nbytes: int) -> None:
    """An imported directory, exported again, whole or in shards: the same model, and the same configuration."""
    _, output = run
    import_checkpoint(tmp_path / "root", output / "checkpoint-4")
    done = export_checkpoint(tmp_path / "root", 4, tmp_path / "out", to="hf", shard_nbytes=shard_nbytes)
    assert done.components == ("model",)
    assert [sentence.partition(":")[0] for sentence in done.left_out] == [
        "optimizer", "scheduler", "rng", "trainer_state",
    ]  # fmt: skip
    assert ((tmp_path / "out" / "model.safetensors.index.json").exists()) == (shard_nbytes == 4000)
    assert done.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    theirs = transformers.GPT2LMHeadModel.from_pretrained(output / "checkpoint-4")
    ours = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_same(ours.state_dict(), theirs.state_dict())
    again = import_checkpoint(tmp_path / "again", tmp_path / "out", step=4)
    assert again.kinds == {"model": "module", "config": "container"}
    assert again.checkpoint.nbytes == sum(p.nbytes for p in theirs.parameters())


def test_a_run_of_ours_goes_out_with_a_configuration(tmp_path: Path) -> None:
    """A model that ckptman saved needs a config.json from outside; its tied weights arrive tied."""
    model = build()
    with CheckpointManager(tmp_path / "root", {"model": model, "ema": torch.ones(2)}) as manager:
        manager.save(1, block=True)
    with pytest.raises(ValueError, match=r"config\.json"):
        export_checkpoint(tmp_path / "root", 1, tmp_path / "out", to="hf")
    model.config.save_pretrained(tmp_path / "config")
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out", to="hf", config=tmp_path / "config" / "config.json")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert_same(loaded.state_dict(), model.state_dict())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.fixture
def folder(run: Any, tmp_path: Path) -> Path:
    """A copy of checkpoint-2 that a test may damage."""
    return Path(shutil.copytree(run[1] / "checkpoint-2", tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]
)
@pytest.mark.parametrize("how", ["empty", "cut"])
def test_a_damaged_file_refuses_the_whole(folder: Path, name: str, how: str) -> None:
    """An empty or truncated file of a directory: the error names it, and nothing is imported."""
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(b"" if how == "empty" else data[: len(data) // 2])
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        import_checkpoint(folder.parent / "root", folder)
    assert not (folder.parent / "root").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_a_partial_directory_is_refused(folder: Path, name: str) -> None:
    """Without weights, or without the file that the Trainer writes last, a directory is incomplete."""
    (folder / name).unlink()
    with pytest.raises(FormatError, match="is incomplete"):
        import_checkpoint(folder.parent / "root", folder)
    assert not (folder.parent / "root").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_run_that_cannot_go_on_exactly_is_imported_only_on_request(folder: Path, name: str) -> None:
    """A Trainer's directory that lacks what it always writes is refused; ``partial`` takes the rest, and says so."""
    (folder / name).unlink()
    with pytest.raises(FormatError, match=rf"incomplete: {name} missing.*--partial"):
        import_checkpoint(folder.parent / "root", folder)
    assert not (folder.parent / "root").exists()
    imported = import_checkpoint(folder.parent / "root", folder, partial=True)
    assert f"{name}: missing in the source" in imported.left_out
    assert "model" in imported.kinds


def test_a_rank_whose_random_streams_are_missing_is_named(folder: Path) -> None:
    """Streams of ranks 0 and 2 are not those of two ranks: one file is gone."""
    for rank in (0, 2):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    (folder / "rng_state.pth").unlink()
    with pytest.raises(FormatError, match=r"rng_state_1\.pth missing"):
        import_checkpoint(folder.parent / "root", folder)


class Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"])
def test_a_bomb_in_any_file_refuses_the_whole(folder: Path, name: str) -> None:
    """The global is named, nothing ran, and nothing is imported."""
    torch.save({"state": {}, "x": Bomb(str(folder.parent / "ran"))}, folder / name)
    with pytest.raises(UnsupportedState, match=r"posix\.mkdir"):
        import_checkpoint(folder.parent / "root", folder)
    assert not (folder.parent / "ran").exists()
    assert not (folder.parent / "root").exists()


def test_training_args_are_never_opened(folder: Path) -> None:
    """Whatever lies under that name, even a pipe that would never end, is left alone."""
    (folder / "training_args.bin").unlink()
    os.mkfifo(folder / "training_args.bin")
    assert "training_args.bin" in import_checkpoint(folder.parent / "root", folder).left_out[0]


def test_a_pipe_in_the_place_of_a_file_is_refused(folder: Path) -> None:
    """It does not hang."""
    (folder / "optimizer.pt").unlink()
    os.mkfifo(folder / "optimizer.pt")
    with pytest.raises((FormatError, StorageError), match=r"optimizer\.pt is not a regular file"):
        import_checkpoint(folder.parent / "root", folder)


def test_a_path_of_another_system_is_only_text(folder: Path) -> None:
    """What trainer_state.json says of Windows is kept as it is, and nothing is looked up by it."""
    state = json.loads((folder / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = "C:\\runs\\out\\checkpoint-1"
    state["log_history"].append({"loss": float("nan")})
    (folder / "trainer_state.json").write_text(json.dumps(state))
    import_checkpoint(folder.parent / "root", folder)
    progress: dict[str, Any] = {}
    with CheckpointManager(folder.parent / "root", {"trainer_state": progress}) as manager:
        manager.restore(only=["trainer_state"])
    assert progress["best_model_checkpoint"] == "C:\\runs\\out\\checkpoint-1"


def test_a_step_that_contradicts_the_name_is_refused(folder: Path) -> None:
    """A checkpoint-2 that says it is of another step was put together by somebody."""
    moved = folder.rename(folder.parent / "checkpoint-7")
    with pytest.raises(FormatError, match="step 7"):
        import_checkpoint(folder.parent / "root", moved)


def test_streams_of_many_processes_are_left_out_aloud(folder: Path) -> None:
    """One process cannot give them back, and says so."""
    for rank in range(2):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
    (folder / "rng_state.pth").unlink()
    imported = import_checkpoint(folder.parent / "root", folder)
    assert "rng" not in imported.kinds
    assert "random streams of 2 processes" in imported.left_out[0]
