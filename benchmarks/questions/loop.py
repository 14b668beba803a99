"""How much slower is a real training loop that saves every minute?"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.kept import keep, kept
from benchmarks.rivals import AsyncTool, Ckptman, CkptmanOverlap, DcpAsync, Tool, TorchSave
from benchmarks.states import State


def train(tool: type[Tool], place: Place) -> Mapping[str, float]:
    """
    A minute of steps with one save in it, from one block of steps that begins with a save and one that does not.

    What a save costs is over soon after it is durable, so the blocks are shorter than a minute and have equally many
    steps: what the one takes longer is what a minute takes longer. Both are of one loop, in random order, so neither
    another process's memory nor the machine's mood of another quarter of an hour comes between them. A block ends when
    what it saved is durable, however long that takes; what the system has still to write then, it writes between the
    blocks. The first save, which takes memory and the root, is made before.
    """
    state = kept(place)
    opened = tool(place.folder, state)
    _begin(opened, 0)()
    steps = _steps_of(state, place.scale.block_s)
    seconds = {}
    for saves in random.Random(place.repetition).sample([True, False], 2):
        system.settle(place.pause_s)
        seconds[saves] = system.timed_now(lambda saves=saves: _block(state, steps, opened if saves else None))
    opened.close()
    every_s = place.scale.save_every_s
    return {
        "period_s": every_s + seconds[True] - seconds[False],
        "plain_period_s": every_s,
        "block_s": seconds[True],
        "plain_block_s": seconds[False],
        "steps": steps,
        "nbytes": state.nbytes,
    }


def _steps_of(state: State, block_s: float) -> int:
    """How many steps take about *block_s*; two to become warm come first."""
    state.train_step()
    state.train_step()
    return max(1, round(block_s / system.timed_now(state.train_step)))


def _block(state: State, steps: int, tool: Tool | None) -> None:
    finish = _begin(tool, 1) if tool is not None else _nothing
    for _ in range(steps):
        state.train_step()
    finish()


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
        Column(field="period_s", title="the time between two saves, with one save in it"),
        Column(field="block_s", title="a block of steps that begins with a save"),
        Column(field="plain_block_s", title="as many steps of the same loop without one"),
    ),
    targets=tuple(
        Target(
            label=f"slowdown of a loop that saves every 60 s{suffix}", contestant=tool.name, field="period_s",
            kind="ratio", limit=1.01, floor=(tool.name,), floor_field="plain_period_s", scales=False,
        )
        for tool, suffix in ((Ckptman, ""), (CkptmanOverlap, ", `overlap=True`"))
    ),
    shares=keep,
    note="Of two blocks of equally many steps, in random order in one loop, one begins with a save and ends when that "
    "is durable; what it takes longer is added to the time between two saves. Model and writer share the cores here; "
    "on a GPU machine the writer has them to itself.",
)  # fmt: skip
