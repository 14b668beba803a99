"""
What a save from many ranks costs rank 0 beside the writing, by simulation: 5,000 tensors on up to 1,024 ranks.

    python -m benchmarks.planning [--tensors 5000] [--ranks 16 64 256 1024] [--out FILE.json]

Every number of ranks has a process of its own. It makes what all ranks would tell, and then does what rank 0 does:

    plan      what all hold → who writes what; once in a run
    join      all reports → one checkpoint's tensors; at every save, as are the following
    write     the manifest's document, read again before it counts
    read      the same once more: what each rank does at a restore
    needs     what a rank of a job of another size reads of all tensors

Times are CPU seconds of one thread; memory is the process's peak, what stands for the other ranks included. The tensors
are cut along their first dimension, as FSDP2 cuts them; some have fewer rows than there are ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import process_time
from typing import Any, TypeVar

import msgspec

from ckptman.format.manifest import Chunk, Component, File, Manifest, Tensor, read_manifest, write_manifest
from ckptman.pipeline import sharing
from ckptman.pipeline.cycles import no_search_for_cycles
from ckptman.pipeline.reports import Report, joined, report_of
from ckptman.plan.load import needs
from ckptman.plan.save import Held

ATTEMPT = "step-000000001000.w0001.0123abcd"
HEADER_NBYTES = 500_000
SHAPES = ((4096, 1024), (11008, 1024), (4096,), (1024, 4096), (32000, 1024), (512,))

Made = TypeVar("Made")


def rows_of(rank: int, world_size: int, rows: int) -> tuple[int, int]:
    """What *rank* holds of *rows*, as torch cuts a dimension: the first row, and how many."""
    each = -(-rows // world_size)
    start = min(rows, rank * each)
    return start, min(rows, start + each) - start


def held_by(rank: int, world_size: int, tensors: int) -> list[Held]:
    """What *rank* tells before the first save."""
    held = []
    for number in range(tensors):
        shape = SHAPES[number % len(SHAPES)]
        start, count = rows_of(rank, world_size, shape[0])
        nbytes = 4 * count * (shape[1] if len(shape) > 1 else 1)
        name = f"model/layers.{number // 6}.block.{number % 6}.weight"
        held.append(Held(name, "float32", shape, (start, *(0 for _ in shape[1:])), (count, *shape[1:]), nbytes))
    return held


def report_by(rank: int, world_size: int, tensors: int) -> bytes:
    """What *rank* reports after it has written."""
    stored, start = [], 8 + HEADER_NBYTES
    for held in held_by(rank, world_size, tensors):
        if held.nbytes:
            digests = tuple(os.urandom(16).hex() for _ in range(-(-held.nbytes // (8 << 20))))
            chunk = Chunk(
                file=0, start=start, nbytes=held.nbytes, digests=digests, offset=held.offset, shape=held.extent
            )
            stored.append(Tensor(name=held.name, dtype=held.dtype, shape=held.shape, chunks=(chunk,)))
            start += held.nbytes
    path = f"{ATTEMPT}/model{f'.rank-{rank:05d}' if rank else ''}.safetensors"
    file = File(path=path, nbytes=start, header_nbytes=HEADER_NBYTES, header_digest="0" * 32)
    return msgspec.msgpack.encode(report_of([file], stored, {}))


def manifest_of(reports: Sequence[bytes], world_size: int) -> Manifest:
    files, tensors = joined([msgspec.msgpack.decode(report, type=Report) for report in reports])
    return Manifest(
        root="simulated",
        step=1000,
        attempt=ATTEMPT,
        after=1,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        world_size=world_size,
        metrics={},
        preempted=False,
        components={"model": Component(kind="module", values=msgspec.Raw(b"null"))},
        files=tuple(files),
        tensors=tuple(tensors),
        aliases={},
        environment={},
    )


def needed(manifest: Manifest, world_size: int) -> int:
    """How many chunks rank 1 of *world_size* reads."""
    found = 0
    for tensor in manifest.tensors:
        start, count = rows_of(1, world_size, tensor.shape[0])
        box = (start, *(0 for _ in tensor.shape[1:])), (count, *tensor.shape[1:])
        found += len(needs(tensor, [box] if count else []))
    return found


def timed(work: Callable[..., Made], *given: object) -> tuple[Made, float]:
    begun = process_time()
    with no_search_for_cycles():  # as the manager works
        made = work(*given)
    return made, round(process_time() - begun, 3)


def plan(tensors: int, world_size: int) -> float:
    """CPU seconds from what all tell to what each is told."""
    part = sharing._Part("model", "module", "", {}, {})
    openings = [sharing._Opening(1000, "", "", [part])] * world_size
    told = [
        msgspec.msgpack.encode(sharing._Details(held_by(rank, world_size, tensors), [""] * tensors))
        for rank in range(world_size)
    ]
    return timed(sharing._planned, openings, told)[1]


def simulate(tensors: int, world_size: int, *, plans: bool = True) -> dict[str, Any]:
    """All figures of one number of ranks."""
    reports = [report_by(rank, world_size, tensors) for rank in range(world_size)]
    manifest, join_s = timed(manifest_of, reports, world_size)
    report_nbytes = sum(map(len, reports))
    del reports
    data, write_s = timed(write_manifest, manifest)
    del manifest
    again, read_s = timed(read_manifest, data, ATTEMPT)
    chunks, needs_s = timed(needed, again, world_size * 3 // 4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    count = sum(len(tensor.chunks) for tensor in again.tensors)
    del again
    return {
        "ranks": world_size,
        "tensors": tensors,
        "chunks": count,
        "manifest_mb": round(len(data) / 1e6, 2),
        "manifest_bytes_per_chunk": round(len(data) / count, 1),
        "reports_mb": round(report_nbytes / 1e6, 1),
        "join_s": join_s,
        "write_s": write_s,
        "read_s": read_s,
        "needs_s": needs_s,
        "chunks_needed": chunks,
        "peak_mib": peak,
        "plan_s": plan(tensors, world_size) if plans else None,
        "peak_with_plan_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=5000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if len(arguments.ranks) == 1:
        found = [simulate(arguments.tensors, arguments.ranks[0])]
    else:
        command = [sys.executable, "-m", "benchmarks.planning", "--tensors", str(arguments.tensors), "--ranks"]
        found = []
        for ranks in arguments.ranks:
            done = subprocess.run([*command, str(ranks)], check=True, stdout=subprocess.PIPE)
            found += json.loads(done.stdout)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
