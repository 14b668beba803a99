"""
Train a small character-level transformer on the sources of Python's own standard library.

    python -m ckptman.demo.training runs/a

An ordinary training script, to be read as an example: run it, kill it, run the same command again. It goes on from
the newest checkpoint, and ends where it would have ended without the interruption, to the last bit.
"""

# A script talks to its user.
# ruff: noqa: T201

from __future__ import annotations

import argparse
import random
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from ckptman import CheckpointManager, Every, keep
from ckptman.demo.accident import KillingSystem
from ckptman.storage.local import LocalStorage
from ckptman.storage.system import SYSTEM

CHARACTERS = 200_000
VOCABULARY = 128
WINDOW = 64
BATCH = 16
WIDTH = 64


def read_text() -> Tensor:
    """The first 200,000 characters of the standard library, in the order of its file names, as numbers below 128."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_text(encoding="utf-8").encode("ascii", errors="replace")
        if len(text) >= CHARACTERS:
            break
    return torch.tensor(list(text[:CHARACTERS]), dtype=torch.long)


class Windows:
    """Batches of windows of the text, shuffled anew for each epoch; knows where in the epoch it is."""

    def __init__(self, text: Tensor, *, seed: int) -> None:
        self._windows = text[: len(text) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(self._windows), generator=self._generator)
        self._position = 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each of shape (batch, window)."""
        if self._position + BATCH > len(self._order):
            self._order = torch.randperm(len(self._windows), generator=self._generator)
            self._position = 0
        batch = self._windows[self._order[self._position : self._position + BATCH]]
        self._position += BATCH
        return batch[:, :-1], batch[:, 1:]

    def state_dict(self) -> dict[str, object]:
        return {"generator": self._generator.get_state(), "order": self._order, "position": self._position}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        generator, order, position = state["generator"], state["order"], state["position"]
        assert isinstance(generator, Tensor)
        assert isinstance(order, Tensor)
        assert isinstance(position, int)
        self._generator.set_state(generator)
        self._order, self._position = order, position


class Transformer(nn.Module):
    """Two layers, with dropout, so that every step draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(WINDOW, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=4 * WIDTH, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(WINDOW), persistent=False)

    def forward(self, characters: Tensor) -> Tensor:
        hidden = self.characters(characters) + self.places
        logits: Tensor = self.out(self.layers(hidden, mask=self.mask, is_causal=True))
        return logits


def train(storage: LocalStorage, *, steps: int, save_every: int) -> None:
    """Train for *steps* steps in all, from the newest checkpoint on if there is one."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    windows = Windows(read_text(), seed=1)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=steps // 10)
    decay = CosineAnnealingLR(optimizer, T_max=steps - steps // 10)
    scheduler = SequentialLR(optimizer, [warm_up, decay], milestones=[steps // 10])
    progress: dict[str, list[float]] = {"losses": []}

    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "windows": windows,
        "progress": progress,
    }
    with CheckpointManager(storage, state, save_every=Every(steps=save_every), keep=keep.last(3)) as manager:
        found = manager.restore()
        print(f"resumed at step {found.step}" if found else "started at step 0", flush=True)
        for step in range(found.step if found else 0, steps):
            characters, targets = windows.next_batch()
            loss = nn.functional.cross_entropy(model(characters).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            progress["losses"].append(loss.item())
            manager.maybe_save(step + 1, metrics={"loss": loss.item()})
    print(f"finished step {steps}, loss {progress['losses'][-1]:.3f}", flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m ckptman.demo.training", description=__doc__.split("\n")[1])
    parser.add_argument("root", help="where the checkpoints go")
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--save-every", type=int, default=80)
    parser.add_argument("--kill-in-save-of", type=int, metavar="STEP", help="die in the middle of that save, once")
    given = parser.parse_args()
    torch.set_num_threads(1)  # sums over several threads may be added in another order each time
    system = SYSTEM if given.kill_in_save_of is None else KillingSystem(given.kill_in_save_of)
    train(LocalStorage(given.root, system=system), steps=given.steps, save_every=given.save_every)


if __name__ == "__main__":
    main()
