"""How long until a blocking save is durable?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.kept import keep, kept, kept_bytes
from benchmarks.rivals import RIVALS, Ckptman, Tool

FLOORS = ("floor: pwrite + fsync", "floor: + sync_file_range", "floor: O_DIRECT + fsync")


def save(tool: type[Tool], place: Place) -> Mapping[str, float]:
    """Two saves, all changed between: as the tool comes, and with every file and folder fsynced after it."""
    state = kept(place)
    opened = tool(place.folder, state)
    first = _save_once(opened, 1, place)
    state.change()
    later = _save_once(opened, 2, place)
    opened.close()
    return {"first_s": sum(first), "native_s": later[0], "seconds": sum(later), "nbytes": state.nbytes}


def _save_once(tool: Tool, step: int, place: Place) -> tuple[float, float]:
    native_s = system.timed(lambda: tool.save(step), pause_s=place.pause_s)
    if isinstance(tool, Ckptman):
        return native_s, 0.0  # has done so itself, and is trusted with it: tests/crash shows it
    return native_s, system.timed_now(lambda: system.fsync_tree(place.folder))


def write(place: Place, *, direct: bool = False, early: bool = False) -> Mapping[str, float]:
    """The same bytes, from one aligned and touched buffer, into one file."""
    payload = kept_bytes(place)

    def seconds(name: str) -> float:
        path = place.folder / name
        return system.timed(lambda: system.write_raw(path, payload, direct=direct, early=early), pause_s=place.pause_s)

    first_s = seconds("first")
    later_s = seconds("later")
    return {"first_s": first_s, "native_s": later_s, "seconds": later_s, "nbytes": len(payload)}


QUESTION = Question(
    name="durable",
    asks="How long until a blocking save is durable?",
    contestants={
        FLOORS[0]: Contestant(run=write),
        FLOORS[1]: Contestant(run=partial(write, early=True)),
        FLOORS[2]: Contestant(run=partial(write, direct=True)),
        **{tool.name: Contestant(run=partial(save, tool), module=tool.module) for tool in (Ckptman, *RIVALS)},
    },
    columns=(
        Column(field="seconds", title="durable: all fsynced", floors=FLOORS),
        Column(field="native_s", title="as it comes", floors=FLOORS, floor_field="seconds"),
        Column(field="first_s", title="first save, all fsynced", floors=FLOORS),
    ),
    targets=(
        Target(
            label="time to durable, `block=True`", contestant=Ckptman.name, field="seconds", kind="ratio", limit=1.10,
            floor=FLOORS,
        ),
    ),
    shares=keep,
    note="Most rivals return before the bytes are on the disk: compare them in the first column. DCP fsyncs its files, "
    "but not the folder.",
)  # fmt: skip
