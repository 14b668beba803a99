"""How long does a state take to an S3 server, and back?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.remote_tools import PLAIN, REMOTE_RIVALS, Ckptman, RemoteTool
from benchmarks.scale import FULL, QUICK, Scale
from benchmarks.server import bucket_of, server_of, serving
from benchmarks.states import trained

FLOORS = tuple(tool.name for tool in PLAIN)
SIZES = {FULL.name: replace(FULL, layers=2), QUICK.name: replace(FULL, layers=1, vocabulary=16_384)}
"""634 and 237 MB: a server on the same disk keeps every byte of every contestant for a while."""
MARGIN_NBYTES = 64 << 20


def there_and_back(tool: type[RemoteTool], place: Place) -> Mapping[str, float]:
    """A save and a load that warm up, and then one of each whose time and memory are taken."""
    server = server_of(place.folder)
    state = trained(_size(place.scale))
    measured: dict[str, float] = {"nbytes": state.nbytes}
    with bucket_of(server) as bucket:
        opened = tool(server, bucket, state)
        opened.save(1)
        opened.load(1)
        state.train_step()
        saved = state.fingerprint()
        measured |= _taken("upload", lambda: opened.save(2), place)
        if tool not in PLAIN:
            state.train_step()
        measured |= _taken("download", lambda: opened.load(2), place)
        opened.close()
    if state.fingerprint() != saved:
        raise AssertionError("the live objects are not what was saved")
    return measured


def _size(scale: Scale) -> Scale:
    return SIZES.get(scale.name, scale)


def _taken(what: str, action: Callable[[], object], place: Place) -> dict[str, float]:
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        seconds = system.timed_now(action)

    system.settle(place.pause_s)
    nbytes = system.extra_nbytes(timed)
    return {f"{what}_s": seconds, f"{what}_nbytes": nbytes}


QUESTION = Question(
    name="remote",
    asks="How long does a state take to an S3 server, and back?",
    contestants={
        tool.name: Contestant(
            run=partial(there_and_back, tool), module=tool.module, is_dispensable=tool in REMOTE_RIVALS
        )
        for tool in (*PLAIN, Ckptman, *REMOTE_RIVALS)
    },
    columns=(
        Column(field="upload_s", title="upload", floors=FLOORS, floor_field="upload_s"),
        Column(field="download_s", title="download", floors=FLOORS, floor_field="download_s"),
        Column(field="upload_nbytes", title="extra memory, upload", is_plotted=False),
        Column(field="download_nbytes", title="extra memory, download", is_plotted=False),
    ),
    targets=(
        *(
            Target(
                label=f"{what} of a state to S3", contestant=Ckptman.name, field=f"{what}_s", kind="ratio",
                limit=round(1 / 0.9, 3), floor=FLOORS, floor_field=f"{what}_s",
            )
            for what in ("upload", "download")
        ),
        *(
            Target(
                label=f"extra memory, {what}", contestant=Ckptman.name, field=f"{what}_nbytes", kind="absolute",
                limit=limit,
            )
            for what, limit in (("upload", 2 * MARGIN_NBYTES), ("download", MARGIN_NBYTES))
        ),
    ),
    beside=serving,
    note="One SeaweedFS server on the same machine, so the server's work takes of the same cores. A floor is one "
    "object in parts, from memory to memory; the best of a repetition counts. ckptman checks every byte, the "
    "others none.",
)  # fmt: skip
