"""What the tests of the guests share: kill-and-resume runs of an example, and comparing how they ended."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.local import LocalStorage

HOME = Path(__file__).parents[3]
EXAMPLES = HOME / "docs" / "examples"
KILLED = -9


def run_jobs(example: str, jobs: Sequence[dict], *, limit_s: float = 150.0) -> list[int]:
    """The exit codes of *jobs*, see forking.py; the output of a job that failed is in the message."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "forking.py"), str(EXAMPLES / example)],
        input=json.dumps(list(jobs)),
        capture_output=True,
        text=True,
        env=environment,
        timeout=limit_s,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    statuses = json.loads(ran.stdout.splitlines()[-1])
    assert {status for status in statuses if status not in (0, KILLED)} == set(), ran.stderr[-4000:]
    return statuses


def kill_and_resume(example: str, place: Path, kills: Sequence[int], *, ranks: int = 1) -> tuple[Path, dict[int, Path]]:
    """Run *example* to its end once, and once for each of *kills*: killed at that fsync, then started again."""
    jobs = [{"arguments": [str(place / "control")], "kill_at": None, "ranks": ranks}]
    for kill in kills:
        again = [str(place / f"killed-{kill}")]
        jobs += [{"arguments": again, "kill_at": at, "ranks": ranks} for at in (kill, None)]
    statuses = run_jobs(example, jobs)
    assert statuses == [0, *([KILLED, 0] * len(kills))], "every kill met its run, and the same command finished it"
    return place / "control", {kill: place / f"killed-{kill}" for kill in kills}


def contents(root: Path, components: Sequence[str]) -> dict[str, object]:
    """The last checkpoint of *root*, verified: the digests of the tensors and the values of *components*."""
    repository = Repository(LocalStorage(root))
    entries = repository.entries()
    assert [fault for entry in entries for fault in verify(repository, entry)] == []
    manifest = repository.manifest(entries[-1])
    assert set(components) <= set(manifest.components), sorted(manifest.components)
    found: dict[str, object] = {"step": entries[-1].step}
    for name in manifest.components:
        if name.partition(".rank-")[0] in components:  # what a rank has of its own is <component>.rank-<number>
            found[name] = msgspec.json.decode(bytes(manifest.components[name].values))
    for tensor in manifest.tensors:
        if tensor.name.partition("/")[0].partition(".rank-")[0] in components:
            digests = [(chunk.offset, chunk.shape, chunk.digests) for chunk in tensor.chunks]
            found[tensor.name] = (tensor.dtype, tensor.shape, digests)
    return found


def differing(control: Path, killed: dict[int, Path], components: Sequence[str]) -> dict[int, list[str]]:
    """For each kill, what its run ended with otherwise than the control run."""
    expected = contents(control, components)
    ended = {kill: contents(root, components) for kill, root in killed.items()}
    return {
        kill: sorted(key for key in {*expected, *end} if end.get(key) != expected.get(key))
        for kill, end in ended.items()
    }
