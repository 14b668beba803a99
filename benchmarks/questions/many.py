"""What does each of very many small tensors cost, beyond its bytes?"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.rivals import Ckptman, Safetensors, Tool, _Tool
from benchmarks.states import Loose


class TorchSaveFlat(_Tool):
    name = "torch.save"
    module = "torch"

    def save(self, step: int) -> None:
        torch.save(self.state.tensors, self.folder / f"{step}.pt")

    def load(self, step: int) -> None:
        self.state.place(torch.load(self.folder / f"{step}.pt", weights_only=True))


def cost(tool: type[Tool], place: Place) -> Mapping[str, float]:
    """Seconds per tensor: what many take longer than one tensor of the same bytes, measured side by side."""
    shapes = [True, False]
    random.Random(place.repetition).shuffle(shapes)
    measured = {as_one: _seconds(tool, place, as_one=as_one) for as_one in shapes}
    count = place.scale.tensors
    return {f"{what}_s": (measured[False][what] - measured[True][what]) / count for what in measured[True]}


def _seconds(tool: type[Tool], place: Place, *, as_one: bool) -> dict[str, float]:
    folder = place.folder / ("one" if as_one else "many")
    folder.mkdir()
    state = Loose(place.scale.tensors, as_one=as_one)
    opened = tool(folder, state)
    first = system.timed(lambda: opened.save(1), pause_s=place.pause_s)
    state.change()
    later = system.timed(lambda: opened.save(2), pause_s=place.pause_s)
    opened.close()
    return {"first_save": first, "save": later, "restore": _restore(tool, folder, place, as_one=as_one)}


def _restore(tool: type[Tool], folder: Path, place: Place, *, as_one: bool) -> float:
    state = Loose(place.scale.tensors, as_one=as_one, seed=1)
    opened = tool(folder, state)
    seconds = system.timed(lambda: opened.load(2), pause_s=place.pause_s)
    opened.close()
    expected = Loose(place.scale.tensors, as_one=as_one)
    expected.change()
    if not all(torch.equal(tensor, expected.tensors[name]) for name, tensor in state.tensors.items()):
        raise AssertionError("the live objects are not what was saved")
    return seconds


QUESTION = Question(
    name="many",
    asks="What does each of very many small tensors cost, beyond its bytes?",
    contestants={
        tool.name: Contestant(run=partial(cost, tool), module=tool.module)
        for tool in (Ckptman, TorchSaveFlat, Safetensors)
    },
    columns=(
        Column(field="save_s", title="later save"),
        Column(field="first_save_s", title="first save"),
        Column(field="restore_s", title="restore"),
    ),
    targets=(
        Target(
            label="cost per small tensor, save", contestant=Ckptman.name, field="save_s", kind="absolute", limit=10e-6
        ),
        Target(
            label="cost per small tensor, restore", contestant=Ckptman.name, field="restore_s", kind="absolute",
            limit=15e-6,
        ),
    ),
    note="Tensors of 64 floats (256 bytes); later saves with every tensor changed. Blocking saves, warm cache.",
)  # fmt: skip
