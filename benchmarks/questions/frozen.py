"""How many bytes do later saves write when most of the model is frozen?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.rivals import RIVALS, Ckptman, Tool
from benchmarks.states import State, adapted, total_nbytes

FLOOR = "floor: what changed"
SAVES = 2


def changed(place: Place) -> Mapping[str, float]:
    """Bytes of the tensors that a training step changes."""
    nbytes = changed_nbytes(adapted(place.scale))
    return {"disk_nbytes": nbytes, "written_nbytes": nbytes}


def changed_nbytes(state: State) -> int:
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    state.train_step()
    return total_nbytes(tensor for name, tensor in state.tensors.items() if not tensor.equal(before[name]))


def growth(tool: type[Tool], place: Place) -> dict[str, float]:
    """How much more lies on the disk per later save, everything else included."""
    state = adapted(place.scale)
    opened = tool(place.folder, state)
    opened.save(1)
    before = system.nbytes_below(place.folder)
    for step in range(2, 2 + SAVES):
        state.train_step()
        seconds = system.timed(lambda step=step: opened.save(step), pause_s=place.pause_s)
    opened.close()
    return {"disk_nbytes": (system.nbytes_below(place.folder) - before) / SAVES, "seconds": seconds}


def growth_of_ckptman(place: Place) -> Mapping[str, float]:
    """And what its own checkpoint says that it wrote."""
    from ckptman import CheckpointManager

    grown = growth(Ckptman, place)
    latest = CheckpointManager(place.folder).latest()
    assert latest is not None
    return {**grown, "written_nbytes": latest.new_nbytes}


QUESTION = Question(
    name="frozen",
    asks="How many bytes do later saves write when most of the model is frozen?",
    contestants={
        FLOOR: Contestant(run=changed),
        Ckptman.name: Contestant(run=growth_of_ckptman),
        **{
            tool.name: Contestant(run=partial(growth, tool), module=tool.module, is_dispensable=True)
            for tool in RIVALS
        },
    },
    columns=(
        Column(field="disk_nbytes", title="on the disk per save", floors=(FLOOR,)),
        Column(field="seconds", title="time of a blocking save, as it comes"),
    ),
    targets=(
        Target(
            label="frozen base: bytes of later saves", contestant=Ckptman.name, field="written_nbytes", kind="ratio",
            limit=1.02, floor=(FLOOR,), floor_field="written_nbytes",
        ),
    ),
    repetitions=3,
    note="Low-rank adapters at the feed-forward layers, and their moments, are trained. The disk holds manifests and "
    "catalog records besides tensors.",
)  # fmt: skip
