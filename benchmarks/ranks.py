"""
Four ranks on one machine: durable saves, restores and memory, beside plain files of the same bytes and torch DCP.

    python -m benchmarks.ranks [--mib 400] [--repetitions 5] [--json ranks.json]

A time is that of the slowest rank, from a barrier to a barrier. Contestants take turns in random order within a
repetition; ratios are medians of those within one. Before each timed block the disk comes to rest, and before each save
every value was changed, so that nothing can be borrowed. A restore is measured twice: with the files dropped from the
page cache, and with all of them in it (how a tool has written must not decide that). It counts only if every tensor is
the saved one. Memory is the peak of the rank that needs most, above what was resident before, in new processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import system
from benchmarks.figures import Target, judge, summarise, values_of
from benchmarks.rank_fleet import RANKS, in_ranks, on_rank_0, timed
from benchmarks.rank_tools import Checked, Ckptman, Dcp, Job, Plain, RankAsyncTool, RankTool
from benchmarks.units import unit_for
from ckptman import CheckpointManager

TOOLS: tuple[type[Any], ...] = (Plain, Checked, Ckptman, Dcp)
BEHIND: tuple[type[Any], ...] = (Ckptman, Dcp)
RESTORING = (partial(Ckptman, prefault=False), Dcp)  # memory that is taken ahead for the next save is not the restore's
PAUSE_S = 0.2
EMPTY_SAVES = 20
MARGIN_NBYTES = 64 << 20

TITLES = {
    "save_s": "blocking save, until durable",
    "stall_s": "asynchronous save, what the call takes",
    "durable_s": "asynchronous save, until durable",
    "cold_s": "restore, nothing cached",
    "cached_s": "restore, all in the page cache",
    "empty_s": "save of an almost empty state",
    "behind_nbytes": "extra memory, asynchronous save",
    "restore_nbytes": "extra memory, restore",
}

TARGETS = (
    *(
        Target(label=f"{TITLES[field]}, to {other}", contestant="ckptman", field=field, kind="ratio", limit=limit,
               floor=(other,), floor_field=field)
        for field in ("save_s", "cold_s", "cached_s")
        for other, limit in (("plain", 1.15), ("plain, checked", 1.15), ("DCP", 1 / 1.5))
    ),
    Target(label=TITLES["empty_s"], contestant="ckptman", field="empty_s", kind="absolute", limit=0.05),
    Target(label=f"{TITLES['behind_nbytes']}, above the shard", contestant="ckptman", field="behind_nbytes",
           kind="above", limit=MARGIN_NBYTES, floor=("shard",), floor_field="nbytes"),
    Target(label=TITLES["restore_nbytes"], contestant="ckptman", field="restore_nbytes", kind="absolute",
           limit=MARGIN_NBYTES),
)  # fmt: skip

Repetitions = list[dict[str, dict[str, float]]]


# ---------------------------------------------------------------------- within a rank


def time_all(rank: int, folder: str, mib: int, repetitions: int, pause_s: float) -> Repetitions:
    """Every tool in every repetition: a blocking save, a restore of it in two ways, an asynchronous save."""
    job, dice = Job(mib), random.Random(0)  # the same order on all ranks
    tools: list[RankTool] = [kind(Path(folder) / kind.name, rank, job) for kind in TOOLS]
    found: Repetitions = []
    for number in range(repetitions + 1):
        measured: dict[str, dict[str, float]] = {tool.name: {} for tool in tools}
        for what in (_saved, _loaded, _saved_behind):
            if what is not _loaded:
                job.change()
            dice.shuffle(tools)
            for tool in tools:
                measured[tool.name] |= what(rank, Path(folder) / tool.name, job, tool, 2 * number, pause_s)
        found += [measured] if number else []  # the first one warms up
    for tool in tools:
        tool.close()
    for measured, seconds in zip(found, _empty(folder, repetitions), strict=True):
        measured["ckptman"]["empty_s"] = seconds
    return found


def _saved(rank: int, folder: Path, job: Job, tool: RankTool, number: int, pause_s: float) -> dict[str, float]:
    on_rank_0(rank, lambda: system.settle(pause_s))
    return {"save_s": timed(lambda: tool.save(number))}


def _loaded(rank: int, folder: Path, job: Job, tool: RankTool, number: int, pause_s: float) -> dict[str, float]:
    expected = job.fingerprint()

    def loaded() -> float:
        job.wipe()
        seconds = timed(lambda: tool.load(number))
        if job.fingerprint() != expected:
            raise AssertionError(f"{tool.name} has not restored what was saved")
        return seconds

    on_rank_0(rank, lambda: (system.drop_caches(folder), system.settle(pause_s)))
    cold_s = loaded()
    on_rank_0(rank, lambda: [path.read_bytes() for path in system.files(folder)])
    return {"cold_s": cold_s, "cached_s": loaded()}


def _saved_behind(rank: int, folder: Path, job: Job, tool: RankTool, number: int, pause_s: float) -> dict[str, float]:
    if type(tool) not in BEHIND:
        return {}
    asynchronous: RankAsyncTool = tool  # type: ignore[assignment]  # BEHIND has those that are
    stalls: list[float] = []

    def save() -> None:
        began = time.perf_counter()
        wait = asynchronous.begin(number + 1)
        stalls.append(time.perf_counter() - began)
        wait()

    on_rank_0(rank, lambda: system.settle(pause_s))
    return {"durable_s": timed(save), "stall_s": stalls[0]}


def _empty(folder: str, repetitions: int) -> list[float]:
    """The median of some saves for each repetition."""
    with CheckpointManager(Path(folder) / "empty", {"progress": {"epoch": 1}}) as manager:
        save = partial(manager.save, block=True)
        save(0)
        return [
            summarise([timed(partial(save, step)) for step in range(1, EMPTY_SAVES)]).median for _ in range(repetitions)
        ]


def take_memory(rank: int, folder: str, mib: int, which: int) -> dict[str, float]:
    """The peak of two asynchronous saves by a tool that is new, and of a restore by another new one."""
    job = Job(mib)

    def save_twice() -> None:
        tool: RankAsyncTool = BEHIND[which](Path(folder), rank, job)
        for number in (1, 2):
            tool.begin(number)()
        tool.close()

    behind = system.extra_nbytes(save_twice)
    tool = RESTORING[which](Path(folder), rank, job)
    restore = system.extra_nbytes(lambda: tool.load(2))
    tool.close()
    return {"behind_nbytes": behind, "restore_nbytes": restore, "nbytes": sum(map(len, job.parts()))}


# ---------------------------------------------------------------------- the run


def run(folder: Path, mib: int, repetitions: int, *, pause_s: float = PAUSE_S) -> dict[str, Any]:
    """Everything, as a document."""
    began, began_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    by_rank = in_ranks(time_all, str(folder / "times"), mib, repetitions, pause_s)
    shutil.rmtree(folder / "times")
    found: Repetitions = by_rank[0]
    for measured, *others in zip(*by_rank, strict=True):
        for name, fields in measured.items():  # a stall ends on each rank by itself, the slowest one counts
            if "stall_s" in fields:
                fields["stall_s"] = max(fields["stall_s"], *(other[name]["stall_s"] for other in others))
    for number, measured in enumerate(found):
        for which, kind in enumerate(BEHIND):
            most = _most(in_ranks(take_memory, str(folder / f"memory-{number}-{kind.name}"), mib, which))
            measured["shard"] = {"nbytes": most.pop("nbytes")}
            measured[kind.name] |= most
            shutil.rmtree(folder / f"memory-{number}-{kind.name}")
    verdicts = [judge(target, found, is_full=True) for target in TARGETS]
    return {
        "machine": system.machine(folder),
        "ranks": RANKS,
        "nbytes": RANKS * found[0]["shard"]["nbytes"],
        "began_at": began_at,
        "duration_s": round(time.monotonic() - began, 1),
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts if verdict is not None],
        "repetitions": found,
    }


def _most(by_rank: list[dict[str, float]]) -> dict[str, float]:
    return {field: max(one[field] for one in by_rank) for field in by_rank[0]}


def report(document: dict[str, Any]) -> str:
    """As tables of Markdown."""
    found: Repetitions = document["repetitions"]
    names = [kind.name for kind in TOOLS]
    rows = [f"{document['ranks']} ranks, {document['nbytes'] / 2**20:.0f} MiB in all", ""]
    rows += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for field, title in TITLES.items():
        values = {name: values_of(found, name, field) for name in names}
        unit = unit_for(field, (value for some in values.values() for value in some))
        cells = [unit.spread(summarise(values[name])) if values[name] else "–" for name in names]
        rows.append(f"| {title}, {unit.name} | " + " | ".join(cells) + " |")
    rows += ["", "| figure | measured (min – max) | target | verdict |", "|---|---|---|---|"]
    rows += [_row(verdict) for verdict in document["verdicts"]]
    return "\n".join(rows)


def _row(verdict: dict[str, Any]) -> str:
    compared = verdict["compared"]
    values = compared["median"], compared["low"], compared["high"]
    if verdict["kind"] == "ratio":
        number, limit = [f"{value:.2f} ×" for value in values], f"≤ {verdict['limit']:.2f} ×"
    else:
        unit = unit_for("nbytes" if verdict["limit"] > 1000 else "seconds", [verdict["limit"]])
        number, limit = [unit.text(value) for value in values], f"≤ {unit.text(verdict['limit'])}"
    word = "met" if verdict["is_met"] else f"**missed by {verdict['missed_by']:.0%}**"
    return f"| {verdict['label']} | {number[0]} ({number[1]} – {number[2]}) | {limit} | {word} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=400)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write: the disk that is measured")
    parser.add_argument("--json", type=Path, help="where every sample goes")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.directory, prefix="ckptman-bench-") as folder:
        document = run(Path(folder), chosen.mib, chosen.repetitions)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(report(document))


if __name__ == "__main__":
    main()
