"""How long does copying a checkpoint to another folder take, checked and durable?"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks import system
from benchmarks.harness import Column, Contestant, Place, Question
from benchmarks.states import trained
from ckptman import CheckpointManager
from ckptman.pipeline.copying import begin
from ckptman.repository.repository import Repository
from ckptman.storage.local import LocalStorage

FLOOR = "floor: cp -r, then fsync of all"
OURS = "ckptman cp"


def save(place: Place) -> None:
    """One checkpoint to copy."""
    state = trained(place.scale)
    with CheckpointManager(place.folder / "root", state.components) as manager:
        manager.save(1, block=True)


def plainly(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    system.fsync_tree(target)


def checked(source: Path, target: Path) -> None:
    """As the command, without the start of its interpreter."""
    storage = LocalStorage(str(source))
    copying = begin(storage, LocalStorage(str(target)), timeout_s=0)
    entries = Repository(storage).entries()
    for entry in entries:
        copying.copy(entry, entries)
    copying.release()


def copied(copy: Callable[[Path, Path], None], place: Place) -> Mapping[str, float]:
    """From a source that is not cached, and then from one that is."""
    source = place.folder / "root"
    measured: dict[str, float] = {"nbytes": system.nbytes_below(source)}
    for field in ("seconds", "cached_s"):
        target = place.folder / field
        if field == "seconds":
            system.drop_caches(source)
        measured[field] = system.timed(partial(copy, source, target), pause_s=place.pause_s)
        shutil.rmtree(target)
    return measured


QUESTION = Question(
    name="copy",
    asks="How long does copying a checkpoint to another folder take, checked and durable?",
    contestants={
        FLOOR: Contestant(run=partial(copied, plainly), prepare=save),
        OURS: Contestant(run=partial(copied, checked), prepare=save),
    },
    columns=(
        Column(field="seconds", title="nothing cached", floors=(FLOOR,)),
        Column(field="cached_s", title="source cached", floors=(FLOOR,)),
    ),
    targets=(),
    note="ckptman compares every byte with its digest on the way, and commits; cp checks nothing.",
)
