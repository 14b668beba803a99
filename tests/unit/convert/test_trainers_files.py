"""What Lightning and accelerate really write: imported, restored, and refused where it must be."""

import logging
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_states import Run, assert_same, restored

from ckptman import CheckpointManager
from ckptman.convert import import_checkpoint
from ckptman.errors import FormatError, UnsupportedState


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_lightning_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Weights, moments and schedule of step 2, in plain torch objects, take the same third step as Lightning's own."""
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 1)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

    torch.manual_seed(0)
    rows = torch.randn(6, 6)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / "pl", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saver], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Lit(), torch.utils.data.DataLoader(rows, batch_size=2))
    second, third = (tmp_path / "pl" / f"epoch=0-step={step}.ckpt" for step in (2, 3))

    imported = import_checkpoint(tmp_path / "root", second)
    assert imported.checkpoint.step == 2
    assert imported.kinds == {
        "model": "module", "optimizer": "stateful", "scheduler": "stateful", "lightning": "container",
    }  # fmt: skip
    model = Lit()
    (optimizer,), (scheduler,) = model.configure_optimizers()
    rest: dict[str, Any] = {}
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler["scheduler"], "lightning": rest}
    restored(tmp_path / "root", state)
    assert (rest["global_step"], rest["hyper_parameters"]) == (2, {"width": 6})
    model.training_step(rows[4:], 0).backward()
    optimizer.step()
    wanted = torch.load(third, weights_only=True)
    assert_same(model.state_dict(), wanted["state_dict"])
    assert_same(optimizer.state_dict()["state"], wanted["optimizer_states"][0]["state"])


class Unknown:
    """A hyperparameter of the user's own."""


def test_a_lightning_checkpoint_with_a_class_is_refused(tmp_path: Path) -> None:
    """Hyperparameters that are objects would have to be unpickled: their class is named."""
    content = {"pytorch-lightning_version": "2.6", "state_dict": {}, "global_step": 1, "hyper_parameters": Unknown()}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UnsupportedState, match=r"test_trainers_files\.Unknown"):
        import_checkpoint(tmp_path / "root", tmp_path / "a.ckpt")
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(FormatError, match="global_step"):
        import_checkpoint(tmp_path / "root", tmp_path / "a.ckpt")
    assert not (tmp_path / "root").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[float]]:
    """A directory of accelerate at step 2; what its random streams give next; and the losses of the next steps."""
    accelerate = pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("accelerate") / "state"
    run = Run()
    accelerator = accelerate.Accelerator(cpu=True)
    run.model, run.optimizer, run.scheduler = accelerator.prepare(run.model, run.optimizer, run.scheduler)
    run.train(0, 2)
    accelerator.save_state(str(folder))
    drawn = random.random(), np.random.rand(), torch.rand(2)
    return folder, drawn, run.train(2, 4)


def test_a_directory_of_accelerate_goes_on_bit_for_bit(saved: Any, tmp_path: Path) -> None:
    """Weights, moments, schedule and random streams are those of the run that wrote it."""
    folder, drawn, losses = saved
    with pytest.raises(ValueError, match="does not say which step"):
        import_checkpoint(tmp_path / "root", folder)
    imported = import_checkpoint(tmp_path / "root", folder, step=2)
    kinds = {"model": "module", "optimizer": "stateful", "scheduler": "stateful", "rng": "rng"}
    assert dict(sorted(imported.kinds.items())) == dict(sorted(kinds.items()))
    again = Run(seed=1)
    with CheckpointManager(tmp_path / "root", again.state) as manager:
        manager.restore()
    assert_same(drawn, (random.random(), np.random.rand(), torch.rand(2)))
    assert again.train(2, 4) == losses


class Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def test_what_is_wrong_with_a_directory_of_accelerate_is_told(saved: Any, tmp_path: Path) -> None:
    """A bomb in any pickle refuses the whole; a missing model too; what is never opened is named."""
    folder = Path(shutil.copytree(saved[0], tmp_path / "state"))
    (folder / "sampler.bin").write_bytes(b"never opened")
    (folder / "notes.txt").write_text("mine")
    shutil.copy(folder / "random_states_0.pkl", folder / "random_states_1.pkl")
    left_out = import_checkpoint(tmp_path / "root", folder, step=2).left_out
    assert [sentence.partition(":")[0] for sentence in left_out] == [
        "notes.txt", "sampler.bin", "random_states_0.pkl, random_states_1.pkl",
    ]  # fmt: skip
    for name in ("optimizer.bin", "scheduler.bin", "custom_checkpoint_0.pkl"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        torch.save({"x": Bomb(str(tmp_path / "ran"))}, folder / name)
        with pytest.raises(UnsupportedState, match=r"posix\.mkdir"):
            import_checkpoint(tmp_path / "other", folder, step=3)
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    for name in ("random_states_0.pkl", "random_states_1.pkl"):
        (folder / name).unlink()
    with pytest.raises(FormatError, match=r"incomplete: random_states_0\.pkl missing"):
        import_checkpoint(tmp_path / "other", folder, step=3)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="has no weights"):
        import_checkpoint(tmp_path / "other", folder, step=3)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "other").exists()


def test_an_unknown_directory_says_what_it_found(tmp_path: Path) -> None:
    """Nothing that is known: the error lists what lies there."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"holds notes\.txt"):
        import_checkpoint(tmp_path / "root", tmp_path / "in", step=1)
    with pytest.raises(FormatError, match="does not exist"):
        import_checkpoint(tmp_path / "root", tmp_path / "none", step=1)
