"""What the tests of the command line share: a run's outcome, and ways to look at a root and to damage it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a run of the command line left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout, which must be exactly one JSON document of schema 1."""
        document = json.loads(self.out)
        assert document["schema"] == 1
        return document

    @property
    def failure(self) -> Any:
        """stderr, which must end in one JSON object with the exit code of the run."""
        failure = json.loads(self.err.splitlines()[-1])
        assert failure.keys() == {"error", "message", "exit_code"}
        assert failure["exit_code"] == self.code
        return failure


Run = Callable[..., Ran]


def one_of(root: Path, pattern: str) -> Path:
    """The one file of *root* that *pattern* matches."""
    (path,) = root.glob(pattern)
    return path


def flip(path: Path, position: int) -> None:
    """Flip one bit of the byte at *position*."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def unfinished(root: Path, nbytes: int = 1000) -> str:
    """Leave what a save that was killed leaves: an attempt with data and no manifest."""
    name = "step-000000000040.w0001.0123abcd"
    (root / name).mkdir()
    (root / name / "weights.safetensors").write_bytes(bytes(nbytes))
    return name


def everything(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below *root*, with size and time of change: equal means untouched."""
    return {
        str(path.relative_to(root)): (stat.st_size, stat.st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if (stat := path.stat())
    }
