"""How long does a restore into live objects take when nothing is cached?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.kept import keep, kept, kept_bytes
from benchmarks.rivals import RIVALS, Ckptman, Tool
from benchmarks.states import State, blank

FLOORS = ("floor: read, 1 thread", "floor: read, 4 threads", "floor: read, O_DIRECT")


def prepare(tool: type[Tool], place: Place) -> None:
    """Save once, and keep what tells whether a load has reached the live objects."""
    state = kept(place)
    opened = tool(_data(place), state)
    opened.save(1)
    opened.close()
    (place.folder / "fingerprint.json").write_text(json.dumps(state.fingerprint()))


def restore(tool: type[Tool], place: Place) -> Mapping[str, float]:
    """Load into a state of other values, which has moments already; check that every tensor is the saved one."""
    state = kept(place)
    return {"seconds": _seconds(tool, place, state), "nbytes": state.nbytes}


def restore_ckptman(place: Place) -> Mapping[str, float]:
    """The same, and then the model alone."""
    state = kept(place)
    seconds = _seconds(Ckptman, place, state)
    return {"seconds": seconds, "model_s": _seconds(Ckptman, place, state, of="model."), "nbytes": state.nbytes}


def _seconds(tool: type[Tool], place: Place, state: State, *, of: str = "") -> float:
    """The time of a load, or of that of the model alone, if it did reach the tensors whose names begin with *of*."""
    state.change()  # nothing is right before
    opened = tool(_data(place), state)
    load = opened.load_model if of and isinstance(opened, Ckptman) else opened.load
    system.drop_caches(place.folder)
    seconds = system.timed(lambda: load(1), pause_s=place.pause_s)
    opened.close()
    saved = json.loads((place.folder / "fingerprint.json").read_text())
    if any(bits != saved[name] for name, bits in state.fingerprint().items() if name.startswith(of)):
        raise AssertionError("the live objects are not what was saved")
    return seconds


def write(place: Place) -> None:
    """A file of its own: what every contestant has read a moment ago may be in a cache below this machine."""
    system.write_raw(_data(place) / "raw", kept_bytes(place))


def read(place: Place, *, threads: int = 1, direct: bool = False) -> Mapping[str, float]:
    """The same bytes from one file, and then as many as the model has."""
    state = blank(place.scale)
    path = _data(place) / "raw"
    buffers = [system.aligned(system.CHUNK) for _ in range(threads)]

    def seconds(nbytes: int) -> float:
        system.drop_caches(place.folder)
        return system.timed(
            lambda: system.read_raw(path, nbytes, buffers=buffers, direct=direct), pause_s=place.pause_s
        )

    return {"seconds": seconds(state.nbytes), "model_s": seconds(state.model_nbytes), "nbytes": state.nbytes}


def _data(place: Place) -> Path:
    folder = place.folder / "data"
    folder.mkdir(exist_ok=True)
    return folder


QUESTION = Question(
    name="restore",
    asks="How long does a restore into live objects take when nothing is cached?",
    contestants={
        FLOORS[0]: Contestant(run=read, prepare=write),
        FLOORS[1]: Contestant(run=partial(read, threads=4), prepare=write),
        FLOORS[2]: Contestant(run=partial(read, direct=True), prepare=write),
        Ckptman.name: Contestant(run=restore_ckptman, prepare=partial(prepare, Ckptman)),
        **{
            tool.name: Contestant(run=partial(restore, tool), prepare=partial(prepare, tool), module=tool.module)
            for tool in RIVALS
        },
    },
    columns=(
        Column(field="seconds", title="whole state", floors=FLOORS),
        Column(field="model_s", title="the model only", floors=FLOORS),
    ),
    targets=(
        Target(
            label="verified restore, cold cache", contestant=Ckptman.name, field="seconds", kind="ratio", limit=1.15,
            floor=FLOORS,
        ),
        Target(
            label='`only=("model",)`, cold cache', contestant=Ckptman.name, field="model_s", kind="ratio", limit=1.15,
            floor=FLOORS, floor_field="model_s",
        ),
    ),
    shares=keep,
    note="ckptman checks every byte, and moonclip says that it does; the others load a flipped bit without an error.",
)  # fmt: skip
