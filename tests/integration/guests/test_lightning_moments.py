"""Moments of a higher precision than their parameters, through a resume with Lightning."""

import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from ckptman.integrations.lightning import CkptmanCheckpoint, CkptmanCheckpointIO, TrainerStreams


class PreciseMomentum(torch.optim.Optimizer):
    """SGD with a momentum in float32 for parameters in bfloat16."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: object = None) -> object:
        loss = closure()
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            state = self.state[parameter]
            momentum = state.setdefault("momentum", torch.zeros_like(parameter, dtype=torch.float32))
            momentum.mul_(0.9).add_(parameter.grad.float())
            parameter.add_(momentum.to(parameter.dtype), alpha=-0.01)
        return loss


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 3, dtype=torch.bfloat16)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.net(batch.bfloat16()).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return PreciseMomentum(self.parameters())


def momenta(callbacks: list, epochs: int, **options: object) -> list[torch.Tensor]:
    seed_everything(0, verbose=False)
    ckpt_path = options.pop("ckpt_path", "last")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet, **options)
    trainer.fit(Model(), DataLoader(torch.arange(48.0).reshape(12, 4), batch_size=4), ckpt_path=ckpt_path)
    return [state["momentum"] for state in trainer.optimizers[0].state.values()]


@pytest.mark.filterwarnings("ignore")
def test_moments_keep_their_dtype_and_bits(tmp_path: Path) -> None:
    """Loaded by Lightning they would be bfloat16; with the callback, and with the plugin, they are as they were."""
    whole = momenta([CkptmanCheckpoint(tmp_path / "whole")], 4)
    momenta([CkptmanCheckpoint(tmp_path / "callback")], 2)
    resumed = momenta([CkptmanCheckpoint(tmp_path / "callback")], 4)
    own = {"plugins": [CkptmanCheckpointIO()]}
    saving = ModelCheckpoint(str(tmp_path / "plugin"), filename="one")
    momenta([saving, TrainerStreams()], 2, ckpt_path=None, **own)
    plugged = momenta(
        [ModelCheckpoint(str(tmp_path / "else")), TrainerStreams()], 4, ckpt_path=saving.best_model_path, **own
    )
    assert {one.dtype for one in (*whole, *resumed, *plugged)} == {torch.float32}
    for one, other, third in zip(whole, resumed, plugged, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
