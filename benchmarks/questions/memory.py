"""How much memory does a save or a restore need beyond what is there already?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.kept import keep, kept
from benchmarks.rivals import ASYNC_RIVALS, RIVALS, AsyncTool, Ckptman, CkptmanOverlap, Tool
from benchmarks.states import blank

NOTHING = "floor: nothing"
MARGIN_NBYTES = 64 << 20


def nothing(place: Place) -> Mapping[str, float]:
    """What must be there: the state once for an asynchronous save, nothing for all else."""
    nbytes = blank(place.scale).nbytes
    return {"behind_nbytes": nbytes, "save_nbytes": 0, "restore_nbytes": 0}


def behind(tool: type[AsyncTool], place: Place) -> Mapping[str, float]:
    """The peak from before the tool exists until its second asynchronous save, of other values, is durable."""
    state = kept(place)

    def save_twice() -> None:
        opened = tool(place.folder, state)
        for step in (1, 2):
            opened.begin(step)()
            state.change()
        opened.close()

    return {"behind_nbytes": system.extra_nbytes(save_twice)}


def blocking(tool: type[Tool], place: Place) -> Mapping[str, float]:
    """The peak of one blocking save, and of a restore into an optimizer that already has its moments."""
    state = kept(place)
    opened = tool(place.folder, state)
    save_nbytes = system.extra_nbytes(lambda: opened.save(1))
    opened.close()
    again = tool(place.folder, state)
    restore_nbytes = system.extra_nbytes(lambda: again.load(1))
    again.close()
    return {"save_nbytes": save_nbytes, "restore_nbytes": restore_nbytes}


def _contestants(
    measure: Callable[..., Mapping[str, float]], tools: tuple[type[Tool], ...], what: str
) -> dict[str, Contestant]:
    return {
        f"{tool.name}: {what}": Contestant(
            run=partial(measure, tool), module=tool.module, is_dispensable=not issubclass(tool, Ckptman)
        )
        for tool in tools
    }


QUESTION = Question(
    name="memory",
    asks="How much memory does a save or a restore need beyond what is there already?",
    contestants={
        NOTHING: Contestant(run=nothing),
        **_contestants(behind, (Ckptman, CkptmanOverlap, *ASYNC_RIVALS), "async"),
        **_contestants(blocking, (Ckptman, *RIVALS), "blocking"),
    },
    columns=(
        Column(field="behind_nbytes", title="asynchronous save", floors=(NOTHING,)),
        Column(field="save_nbytes", title="blocking save"),
        Column(field="restore_nbytes", title="restore"),
    ),
    targets=tuple(
        Target(
            label=f"extra memory, {label}", contestant=f"ckptman: {who}", field=field, kind="above",
            limit=MARGIN_NBYTES, floor=(NOTHING,), floor_field=field,
        )
        for label, who, field in (
            ("asynchronous save", "async", "behind_nbytes"),
            ("`block=True`", "blocking", "save_nbytes"),
            ("restore", "blocking", "restore_nbytes"),
        )
    ),
    repetitions=3,
    shares=keep,
    note="Peak of resident memory above what was resident before; memory of other processes "
    "(torch_checkpointing writes in one) is not counted.",
)  # fmt: skip
