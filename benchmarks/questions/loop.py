"""How much slower is a real training loop that saves every minute?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.rivals import AsyncTool, Ckptman, CkptmanOverlap, DcpAsync, Tool, TorchSave
from benchmarks.states import State, trained

FLOOR = "floor: no checkpoints"


def train(tool: type[Tool] | None, place: Place) -> Mapping[str, float]:
    """
    Seconds per step of a loop that saves every so often.

    The loop goes on for one interval after its last save, so that whatever is written behind its back is part of it.
    """
    state = trained(place.scale)
    opened = tool(place.folder, state) if tool is not None else None
    for _ in range(3):
        state.train_step()
    system.settle(place.pause_s)
    per_step = _train(opened, state, every_s=place.scale.save_every_s, saves=place.scale.saves)
    if opened is not None:
        opened.close()
    return {"step_s": per_step, "every_s": place.scale.save_every_s, "nbytes": state.nbytes}


def _train(tool: Tool | None, state: State, *, every_s: float, saves: int) -> float:
    steps = saved = 0
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < (saves + 1) * every_s:
        if tool is not None and saved < saves and elapsed >= (saved + 1) * every_s:
            saved += 1
            _save(tool, saved)
        state.train_step()
        steps += 1
    return elapsed / steps


def _save(tool: Tool, step: int) -> None:
    begin: AsyncTool | None = tool if hasattr(tool, "begin") else None
    if begin is not None:
        begin.begin(step)
    else:
        tool.save(step)


TOOLS = (Ckptman, CkptmanOverlap, TorchSave, DcpAsync)

QUESTION = Question(
    name="loop",
    asks="How much slower is a real training loop that saves every minute?",
    contestants={
        FLOOR: Contestant(run=partial(train, None)),
        **{
            tool.name: Contestant(
                run=partial(train, tool), module=tool.module, is_dispensable=not issubclass(tool, Ckptman)
            )
            for tool in TOOLS
        },
    },
    columns=(Column(field="step_s", title="seconds per training step", floors=(FLOOR,)),),
    targets=tuple(
        Target(
            label=f"slowdown of a loop that saves every 60 s{suffix}", contestant=tool.name, field="step_s",
            kind="ratio", limit=1.01, floor=(FLOOR,), floor_field="step_s", scales=False,
        )
        for tool, suffix in ((Ckptman, ""), (CkptmanOverlap, ", `overlap=True`"))
    ),
    repetitions=3,
    note="Model and writer share the cores here; on a GPU machine the writer has them to itself.",
)  # fmt: skip
