"""Lightning: what paths mean, what is removed and when, what is refused; the plugin beside other callbacks, Fabric."""

import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from s3_server import S3Server
from torch.utils.data import DataLoader, TensorDataset

from ckptman import CheckpointManager, DamagedCheckpointWarning, FormatError, StateMismatch, UnsupportedState
from ckptman.integrations.documents import Part, read
from ckptman.integrations.lightning import (
    CkptmanCheckpoint,
    CkptmanCheckpointIO,
    FabricStreams,
    TrainerStreams,
    resume_path,
)

EPOCHS = 3
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Model(LightningModule):
    def __init__(self, extra: object = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("val", self.net(batch[0]).abs().mean())

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("test", self.net(batch[0]).abs().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(seed: int = 0, *, shuffle: bool = True) -> DataLoader:
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(inputs), batch_size=4, shuffle=shuffle)


def fit(callbacks: list, *, epochs: int = EPOCHS, extra: object = 0, **options: object) -> tuple[Trainer, Model]:
    """A run of three steps per epoch, over an ordinary loader that shuffles, with validation after every epoch."""
    ckpt_path = options.pop("ckpt_path", None)
    seed_everything(0, verbose=False)
    model = Model(extra)
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader(), loader(1, shuffle=False), ckpt_path=ckpt_path)
    return trainer, model


def weights(model: LightningModule) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def steps(root: Path) -> list[int]:
    return [one.step for one in CheckpointManager(root).checkpoints()]


def test_between_epochs_an_ordinary_loader_resumes_exactly(tmp_path: Path) -> None:
    """By the callback, and by the plugin beside ModelCheckpoint: data order and dropout are as if nothing happened."""
    _, whole = fit([CkptmanCheckpoint(tmp_path / "whole")])
    fit([CkptmanCheckpoint(tmp_path / "callback")], epochs=1)
    _, resumed = fit([CkptmanCheckpoint(tmp_path / "callback")], ckpt_path="last")
    assert same(weights(resumed), weights(whole))

    def by_plugin(epochs: int, ckpt_path: str | None) -> Model:
        saving = ModelCheckpoint(str(tmp_path / "plugin"), save_top_k=-1)
        plugin = CkptmanCheckpointIO()
        return fit([saving, TrainerStreams()], epochs=epochs, plugins=[plugin], ckpt_path=ckpt_path)[1]

    by_plugin(1, None)
    resumed = by_plugin(EPOCHS, resume_path(tmp_path / "plugin"))
    assert same(weights(resumed), weights(whole))
    assert steps(tmp_path / "plugin") == [3, 6, 9]


def test_lightning_without_the_streams_does_not(tmp_path: Path) -> None:
    """The same runs with Lightning's own files end elsewhere, so the test above can fail."""
    _, whole = fit([ModelCheckpoint(str(tmp_path / "whole"))])
    first, _ = fit([ModelCheckpoint(str(tmp_path / "own"))], epochs=1)
    path = first.checkpoint_callback.best_model_path
    _, resumed = fit([ModelCheckpoint(str(tmp_path / "own"))], ckpt_path=path)
    assert not same(weights(resumed), weights(whole))


def test_names_best_and_retention_are_lightnings(tmp_path: Path) -> None:
    """The best is loaded by its path; what save_top_k lets go is gone; a first run finds nothing and starts afresh."""
    root = tmp_path / "root"
    assert resume_path(root) is None
    saving = CkptmanCheckpoint(root, monitor="val", save_top_k=1, save_last=True)
    trainer, model = fit([saving], ckpt_path="last")
    best = saving.best_model_path
    assert Path(best).parent == root
    trainer.test(model, loader(2), ckpt_path="best", verbose=False)
    _, document = read(root, which=_tag(best))
    assert same(weights(model), [document["state_dict"][name] for name, _ in model.named_parameters()])
    kept = {*steps(root)}
    assert document["global_step"] in kept
    assert 9 in kept, "save_last"
    assert len(kept) <= 2
    plain = Model()
    with CheckpointManager(root, {"model": plain}, rng=False) as manager:
        manager.restore(9, only=["model"])
    assert same(weights(plain), [read(root, 9)[1]["state_dict"][name] for name, _ in plain.named_parameters()])


def _tag(path: str) -> str:
    from ckptman.integrations.files import tag_of

    return tag_of(Path(path).name)


def test_a_damaged_newest_is_passed_over(tmp_path: Path) -> None:
    """ckpt_path="last" goes on from the one before, with a warning, instead of from wrong bytes."""
    fit([CkptmanCheckpoint(tmp_path, save_top_k=-1)])
    newest = max(tmp_path.glob("step-*9.*/model.safetensors"))
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with pytest.warns(DamagedCheckpointWarning, match="step 9"):
        assert read(tmp_path)[0].step == 6
    trainer, _ = fit([CkptmanCheckpoint(tmp_path, save_top_k=-1)], ckpt_path="last")
    assert trainer.global_step == 9


def test_what_needs_pickle_is_refused_with_its_path(tmp_path: Path) -> None:
    """A hyperparameter that is an object of the user's: nothing is saved, and the message says where it is."""
    with pytest.raises(UnsupportedState, match=r"hyper_parameters\['extra'\]"):
        fit([CkptmanCheckpoint(tmp_path)], extra=object())
    assert steps(tmp_path) == []


def test_a_file_of_lightnings_own_is_still_loaded(tmp_path: Path) -> None:
    """A path that is not in a root goes where it went before."""
    first, model = fit([ModelCheckpoint(str(tmp_path / "own"))])
    path = first.checkpoint_callback.best_model_path
    trainer = Trainer(callbacks=[CkptmanCheckpoint(tmp_path / "root")], **QUIET)
    other = Model()
    trainer.test(other, loader(2), ckpt_path=path, verbose=False)
    assert same(weights(other), weights(model))


class Folders(SingleDeviceStrategy):
    """Writes a folder of two files, one of them empty, and reads it."""

    def save_checkpoint(self, checkpoint: dict, filepath: Path, storage_options: object = None) -> None:
        (filepath / "inner").mkdir(parents=True)
        torch.save(checkpoint, filepath / "inner" / "all.pt")
        (filepath / "empty").touch()

    def load_checkpoint(self, checkpoint_path: Path, weights_only: bool | None = None) -> dict:
        assert (checkpoint_path / "empty").read_bytes() == b""
        return torch.load(checkpoint_path / "inner" / "all.pt", weights_only=False)


def test_a_strategy_that_writes_its_own_way_is_resumed_and_kept_as_others_are(tmp_path: Path) -> None:
    """Its files are in the root: resumed and tested from, and removed when newer ones replace them."""
    root = tmp_path / "root"
    own = {"default_root_dir": tmp_path / "own"}
    _, whole = fit([CkptmanCheckpoint(tmp_path / "whole")], strategy=Folders("cpu"), **own)
    fit([CkptmanCheckpoint(root, save_last=True)], epochs=2, strategy=Folders("cpu"), **own)
    again = [CkptmanCheckpoint(root, save_last=True)]
    trainer, model = fit(again, ckpt_path="last", strategy=Folders("cpu"), **own)
    assert same(weights(model), weights(whole))
    assert [one.step for one in CheckpointManager(root).checkpoints()] == [9]
    other = Model()
    trainer.test(other, loader(2), ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)
    assert same(weights(other), weights(model))
    assert not list((tmp_path / "own").rglob("*.ckpt"))


def test_what_files_of_a_strategy_need_is_said(tmp_path: Path) -> None:
    """A folder, before training; the same number of ranks; and names that stay in the folder."""
    with pytest.raises(MisconfigurationException, match="give Trainer a default_root_dir that is a path"):
        fit([CkptmanCheckpoint(tmp_path)], strategy=Folders("cpu"), default_root_dir="memory://somewhere")
    for name, ranks, error in (("a", 2, StateMismatch), ("../a", 1, FormatError), ("/a", 1, FormatError)):
        files = Part({"name": name, "world_size": ranks, "files": {name: torch.ones(1, dtype=torch.uint8)}})
        with CheckpointManager(tmp_path / "root", {"files": files}, rng=False) as manager:
            manager.save(3, block=True)
        with pytest.raises(error):
            own = {"strategy": Folders("cpu"), "default_root_dir": tmp_path / "own"}
            fit([CkptmanCheckpoint(tmp_path / "root")], ckpt_path="last", **own)
    assert not (tmp_path / "a").exists()


def test_a_root_may_be_in_an_object_store(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL as dirpath, with the credentials in the environment, where Lightning too looks for them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(s3_server.options["key"]))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(s3_server.options["secret"]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", str(s3_server.options["endpoint_url"]))
    root = s3_server.new_root()
    _, whole = fit([CkptmanCheckpoint(f"{root}-whole")])
    fit([CkptmanCheckpoint(root)], epochs=1)
    trainer, resumed = fit([CkptmanCheckpoint(root)], ckpt_path="last")
    assert same(weights(resumed), weights(whole))
    assert trainer.ckpt_path == resume_path(root) == f"{root}/ckptman.json"


def test_fabric_saves_and_loads(tmp_path: Path) -> None:
    """Weights, moments, progress and random streams come back by Fabric's own save and load."""
    fabric = Fabric(accelerator="cpu", plugins=[CkptmanCheckpointIO()])
    torch.manual_seed(0)
    model, optimizer = fabric.setup(net := torch.nn.Linear(4, 1), torch.optim.Adam(net.parameters()))
    state = {"model": model, "optimizer": optimizer, "streams": FabricStreams(fabric), "global_step": 1}

    def train_one() -> list[torch.Tensor]:
        optimizer.zero_grad()
        fabric.backward(model(torch.randn(8, 4)).square().mean())
        optimizer.step()
        return weights(model)

    train_one()
    fabric.save(tmp_path / "run" / "one.ckpt", state)
    expected = [train_one(), train_one()]
    rest = fabric.load(tmp_path / "run" / "one.ckpt", state)
    assert [same(train_one(), one) for one in expected] == [True, True]
    assert (rest, state["global_step"], steps(tmp_path / "run")) == ({}, 1, [1])
