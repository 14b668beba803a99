"""How long does it take to look into a root with very many checkpoints?"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from benchmarks import system
from benchmarks.figures import Target
from benchmarks.harness import Column, Contestant, Place, Question
from ckptman import CheckpointManager
from ckptman.format.catalog import Entry
from ckptman.repository.ownership import take
from ckptman.storage.opening import open_storage

FLOOR = "floor: one listing, one read"
OURS = "ckptman"
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def prepare(place: Place) -> None:
    """Commit one record that lists them all."""
    owner = take(open_storage(place.folder), timeout_s=0)
    owner.commit(lambda _: [_entry(step) for step in range(1, place.scale.checkpoints + 1)], "bench")
    owner.release()


def _entry(step: int) -> Entry:
    return Entry(
        step=step,
        attempt=f"step-{step:012d}.w0001.{step:08x}",
        manifest=f"{step:064x}",
        after=step,
        created_at=BEGAN + timedelta(minutes=step),
        nbytes=1 << 30,
        new_nbytes=1 << 30,
        world_size=1,
        components=("model", "optimizer", "scheduler"),
        metrics={"loss": 1 / step},
    )


def look(place: Place) -> Mapping[str, float]:
    manager = CheckpointManager(place.folder)
    CheckpointManager("memory://warm").checkpoints()  # imports are no part of it

    def latest() -> None:
        found = manager.latest()
        assert found is not None
        assert found.step == place.scale.checkpoints

    def checkpoints() -> None:
        assert len(manager.checkpoints()) == place.scale.checkpoints

    return {"latest_s": _cold(latest, place), "checkpoints_s": _cold(checkpoints, place)}


def _cold(action, place: Place) -> float:
    system.drop_caches(place.folder)
    return system.timed(action, pause_s=place.pause_s)


def list_and_read(place: Place) -> Mapping[str, float]:
    folder = max(system.files(place.folder), key=lambda path: path.stat().st_size).parent
    seconds = _cold(lambda: max(folder.iterdir()).read_bytes(), place)
    return {"latest_s": seconds, "checkpoints_s": seconds}


QUESTION = Question(
    name="catalog",
    asks="How long does it take to look into a root with very many checkpoints?",
    contestants={
        FLOOR: Contestant(run=list_and_read, prepare=prepare),
        OURS: Contestant(run=look, prepare=prepare),
    },
    columns=(
        Column(field="latest_s", title="`latest()`", floors=(FLOOR,)),
        Column(field="checkpoints_s", title="`checkpoints()`", floors=(FLOOR,)),
    ),
    targets=(
        Target(label="`latest()` of 10,000", contestant=OURS, field="latest_s", kind="absolute", limit=0.020),
        Target(label="`checkpoints()` of 10,000", contestant=OURS, field="checkpoints_s", kind="absolute", limit=0.100),
    ),
    note="Cold cache. No rival keeps a catalog of its checkpoints.",
)
