"""How much slower is a real training loop that saves every minute?"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from functools import partial

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.rivals import AsyncTool, Ckptman, CkptmanOverlap, DcpAsync, Tool, TorchSave
from benchmarks.states import State, trained


def train(tool: type[Tool], place: Place) -> Mapping[str, float]:
    """
    Seconds per step of intervals that begin with a save, and of such that do not, in pairs of random order.

    One loop has both, so neither another process's memory nor the machine's mood of another quarter of an hour comes
    between them: a difference of one per cent is less than that. An interval ends when what it saved is durable. The
    first save, which takes memory and the root, is made before.
    """
    state = trained(place.scale)
    opened = tool(place.folder, state)
    _begin(opened, 0)()
    for _ in range(3):
        state.train_step()
    order = random.Random(place.repetition)
    seconds, steps = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    system.settle(place.pause_s)
    for pair in range(place.scale.saves):
        for saves in order.sample([True, False], 2):
            took_s, count = _interval(state, place.scale.save_every_s, opened if saves else None, step=pair + 1)
            seconds[saves] += took_s
            steps[saves] += count
    opened.close()
    return {
        "step_s": seconds[True] / steps[True],
        "plain_step_s": seconds[False] / steps[False],
        "every_s": place.scale.save_every_s,
        "nbytes": state.nbytes,
    }


def _interval(state: State, every_s: float, tool: Tool | None, *, step: int) -> tuple[float, int]:
    """Seconds and steps."""
    began = time.perf_counter()
    finish = _begin(tool, step) if tool is not None else _nothing
    count = 0
    while time.perf_counter() - began < every_s or count == 0:
        state.train_step()
        count += 1
    finish()
    return time.perf_counter() - began, count


def _begin(tool: Tool, step: int):
    begin: AsyncTool | None = tool if hasattr(tool, "begin") else None
    if begin is not None:
        return begin.begin(step)
    tool.save(step)
    return _nothing


def _nothing() -> None:
    pass


TOOLS = (Ckptman, CkptmanOverlap, TorchSave, DcpAsync)

QUESTION = Question(
    name="loop",
    asks="How much slower is a real training loop that saves every minute?",
    contestants={
        tool.name: Contestant(
            run=partial(train, tool), module=tool.module, is_dispensable=not issubclass(tool, Ckptman)
        )
        for tool in TOOLS
    },
    columns=(
        Column(field="step_s", title="seconds per training step of intervals with a save"),
        Column(field="plain_step_s", title="of intervals without, in the same loop"),
    ),
    targets=tuple(
        Target(
            label=f"slowdown of a loop that saves every 60 s{suffix}", contestant=tool.name, field="step_s",
            kind="ratio", limit=1.01, floor=(tool.name,), floor_field="plain_step_s", scales=False,
        )
        for tool, suffix in ((Ckptman, ""), (CkptmanOverlap, ", `overlap=True`"))
    ),
    repetitions=3,
    note="Intervals with a save and without one alternate at random in one loop; each contestant is held against its "
    "own plain intervals. Model and writer share the cores here; on a GPU machine the writer has them to itself.",
)  # fmt: skip
