"""One root, made by a real manager, and copies of it that a test may damage."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_roots import Ran, Run, flip, one_of
from click.testing import CliRunner

from ckptman import CheckpointManager
from ckptman.cli._group import ckptman


@pytest.fixture
def run() -> Run:
    """Run the command line in this process."""

    def call(*words: object, env: dict[str, str] | None = None) -> Ran:
        result = CliRunner().invoke(ckptman, [str(word) for word in words], env=env or {"CKPTMAN_ROOT": None})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Ran(code=result.exit_code, out=result.stdout, err=result.stderr)

    return call


@pytest.fixture(scope="session")
def made_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 (tagged "first"), 20 and 30, with losses 0.1, 0.3 and NaN; nobody may change it."""
    root = tmp_path_factory.mktemp("cli") / "root"
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.rand(4, 2, generator=generator), "gone": torch.zeros(3), "same": torch.ones(5)}
    trainer: dict[str, object] = {"epoch": 0, "names": ["a", "b"], "pair": (1, 2)}
    with CheckpointManager(root, {"weights": weights, "trainer": trainer, "note": "hello"}, rng=False) as manager:
        for step, loss in ((10, 0.1), (20, 0.3), (30, float("nan"))):
            trainer["epoch"] = step
            weights["w"] += 1
            if step == 20:
                weights["new"] = torch.zeros(2)
                del weights["gone"]
            manager.save(step, metrics={"loss": loss}, block=True, tags=("first",) if step == 10 else ())
    return root


@pytest.fixture
def root(made_root: Path, tmp_path: Path) -> Path:
    """A copy of `made_root` of the test's own."""
    return Path(shutil.copytree(made_root, tmp_path / "root"))


@pytest.fixture
def damaged(root: Path) -> Path:
    """`root`, with a bit flipped in the last byte of the data of step 20."""
    flip(one_of(root, "step-000000000020.*/weights.safetensors"), -1)
    return root


@pytest.fixture
def torn(root: Path) -> Path:
    """`root`, with a bit flipped in its newest catalog record, the one that added step 30."""
    flip(sorted((root / "catalog").iterdir())[-1], 200)
    return root


@pytest.fixture
def held(root: Path) -> Iterator[Path]:
    """`root`, while another process holds the writer's lock."""
    program = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(root / "writer.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield root
        holder.kill()
