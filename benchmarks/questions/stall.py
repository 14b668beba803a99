"""How long does an asynchronous save keep training waiting?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from functools import partial

import torch

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.kept import keep, kept
from benchmarks.rivals import ASYNC_RIVALS, AsyncTool, Ckptman, CkptmanOverlap
from benchmarks.states import State

FLOOR = "floor: one warm copy"
PLAIN_STEPS = 3


def stall_of(tool: type[AsyncTool], place: Place) -> dict[str, float]:
    """The first call, the median of later ones, and how much longer the training step after such a call takes."""
    state = kept(place)
    with_steps = tool(place.folder, state)
    plain_s = statistics.median(_seconds_of_a_step(state) for _ in range(PLAIN_STEPS))  # what is warmed up, is by now
    calls = [_one_save(with_steps, state, step, place) for step in range(1, 2 + place.scale.later_saves)]
    with_steps.close()
    later = calls[1:]
    return {
        "first_s": calls[0][0],
        "later_s": statistics.median(call_s for call_s, _ in later),
        "next_step_s": statistics.median(step_s for _, step_s in later),
        "plain_step_s": plain_s,
        "nbytes": state.nbytes,
    }


def _one_save(tool: AsyncTool, state: State, step: int, place: Place) -> tuple[float, float]:
    waits = []
    call_s = system.timed(lambda: waits.append(tool.begin(step)), pause_s=place.pause_s)
    step_s = _seconds_of_a_step(state, before=getattr(tool, "before_step", None))  # nothing is left to borrow
    waits[0]()
    return call_s, step_s


def _seconds_of_a_step(state: State, before=None) -> float:
    began = time.perf_counter()
    if before is not None:
        before()
    state.train_step()
    return time.perf_counter() - began


def copy(place: Place) -> Mapping[str, float]:
    """The same bytes into memory that has been written before."""
    state = kept(place)
    copies = [torch.empty_like(tensor) for tensor in state.tensors.values()]

    def copy_all() -> None:
        for into, tensor in zip(copies, state.tensors.values(), strict=True):
            into.copy_(tensor)

    copy_all()
    seconds = [_after_a_step(copy_all, state, place) for _ in range(place.scale.later_saves)]
    return {"later_s": statistics.median(seconds), "first_s": seconds[0], "nbytes": state.nbytes}


def _after_a_step(action, state: State, place: Place) -> float:
    state.train_step()
    return system.timed(action, pause_s=place.pause_s)


TOOLS = (Ckptman, CkptmanOverlap, *ASYNC_RIVALS)

QUESTION = Question(
    name="stall",
    asks="How long does an asynchronous save keep training waiting?",
    contestants={
        FLOOR: Contestant(run=copy),
        **{tool.name: Contestant(run=partial(stall_of, tool), module=tool.module) for tool in TOOLS},
    },
    columns=(
        Column(field="later_s", title="later saves", floors=(FLOOR,)),
        Column(field="first_s", title="first save", floors=(FLOOR,), floor_field="later_s"),
        Column(field="next_step_s", title="the training step after it"),
        Column(field="plain_step_s", title="a plain step", is_plotted=False),
    ),
    targets=(
        Target(
            label="stall, later saves", contestant=Ckptman.name, field="later_s", kind="ratio", limit=1.15,
            floor=(FLOOR,), floor_field="later_s",
        ),
        Target(
            label="stall, first save", contestant=Ckptman.name, field="first_s", kind="ratio", limit=1.5,
            floor=(FLOOR,), floor_field="later_s",
        ),
        Target(
            label="stall with `overlap=True`", contestant=CkptmanOverlap.name, field="later_s", kind="ratio",
            limit=0.05, floor=(FLOOR,), floor_field="later_s",
        ),
    ),
    shares=keep,
    note="DCP with a stager and torch_checkpointing copy while training goes on: safe only for a user who waits before "
    "`optimizer.step()`, which is done here inside the step after the save.",
)  # fmt: skip
