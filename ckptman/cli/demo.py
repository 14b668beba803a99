"""``ckptman demo``: train, be killed in the middle of a save, resume, and prove that it made no difference."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.text import Text

from ckptman.cli.ls import print_checkpoints
from ckptman.format.manifest import Manifest, Tensor
from ckptman.repository.diff import difference
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.local import LocalStorage

STEPS = 480
SAVE_EVERY = 80
KILLED_IN_SAVE_OF = 320
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """A root after its run: the newest checkpoint's manifest, and how many checkpoints were re-read whole."""

    manifest: Manifest
    verified: int


@click.command(short_help="See a run killed in the middle of a save, and resumed.")
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path, file_okay=False))
def demo(folder: Path | None) -> None:
    """
    Train on real text, get killed in the middle of a save, resume, and prove the result bit-identical.

    With DIR, which must be empty or new, the checkpoints stay in DIR/interrupted and DIR/control.
    """
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise click.UsageError(f"{folder} is not empty: give a new or empty directory, so that nothing is mixed up")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    began = time.monotonic()
    with _place(folder) as place:
        _act(console, place)
        console.print(f"\nTook {time.monotonic() - began:.0f} s. {_what_next(folder)}")


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ckptman-demo-") as temporary:
        yield Path(temporary)


def _act(console: Console, place: Path) -> None:
    interrupted, control = place / "interrupted", place / "control"
    console.print(
        f"A small transformer learns Python's standard library, character by character: {STEPS} steps, saved every "
        f"{SAVE_EVERY}.\nOne run is killed while it saves step {KILLED_IN_SAVE_OF}, and started again. "
        "A control run beside it is left in peace.\n"
    )
    command = _training(interrupted, "--kill-in-save-of", str(KILLED_IN_SAVE_OF))
    with _started(_training(control)) as undisturbed, console.status("training …"):
        _tick(console, _prove_killed(_finish(_popen(command)), interrupted))
        _tick(console, _prove_resumed(_finish(_popen(command))))
        _succeed(_finish(undisturbed))
    _tick(console, f"the control run went from step 0 to step {STEPS} without an interruption")
    a, b = _final(interrupted), _final(control)
    _tick(console, f"every byte of all {a.verified + b.verified} checkpoints was read again and has the digest it had")
    console.print("\nThe two final checkpoints, compared by the digests of their tensors and by their values:")
    for line in _prove_identical(a.manifest, b.manifest):
        _tick(console, line)
    console.print("\nThe checkpoints of the run that was interrupted:")
    print_checkpoints(Repository(LocalStorage(interrupted)).checkpoints())


# ------------------------------------------------------------------ running


def _training(root: Path, *more: str) -> list[str]:
    steps = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]
    return [sys.executable, "-m", "ckptman.demo.training", str(root), *steps, *more]


def _popen(command: list[str]) -> subprocess.Popen[str]:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", errors="replace", env=one_thread,
    )  # fmt: skip


@contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A run beside; it never outlives the block."""
    process = _popen(command)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended, and all that it said."""

    exit_code: int
    said: str


def _finish(process: subprocess.Popen[str]) -> Ended:
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _fail(f"a training run took more than {TIMEOUT_S:.0f} s")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return Ended(exit_code=process.returncode, said=said)


def _succeed(run: Ended) -> None:
    if run.exit_code != 0:
        _fail(f"a training run ended with exit code {run.exit_code}; it said:\n{run.said}")


# ------------------------------------------------------------------ proving


def _prove_killed(run: Ended, root: Path) -> str:
    expected = -signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM
    if run.exit_code != expected:
        _fail(f"the first run should have been killed, but ended with exit code {run.exit_code}:\n{run.said}")
    entries = Repository(LocalStorage(root)).entries()
    torn = [path for path in root.iterdir() if path.name.startswith(f"step-{KILLED_IN_SAVE_OF:012d}.")]
    files = [path.name for folder in torn for path in folder.iterdir()]
    if not files or "manifest.json" in files or not entries or entries[-1].step != KILLED_IN_SAVE_OF - SAVE_EVERY:
        _fail(f"the kill was not in the middle of the save of step {KILLED_IN_SAVE_OF}: it left {sorted(files)}")
    return (
        f"killed (SIGKILL) in the middle of saving step {KILLED_IN_SAVE_OF}: {len(files)} files were begun, nothing "
        f"was committed, and the newest checkpoint is step {entries[-1].step}"
    )


def _prove_resumed(run: Ended) -> str:
    _succeed(run)
    step = KILLED_IN_SAVE_OF - SAVE_EVERY
    if f"resumed at step {step}\n" not in run.said:
        _fail(f"the second run should have resumed at step {step}; it said:\n{run.said}")
    return f"the same command again resumed at step {step} and went on to step {STEPS}"


def _final(root: Path) -> Final:
    repository = Repository(LocalStorage(root))
    entries = repository.entries()
    faults = [fault.what for entry in entries for fault in verify(repository, entry)]
    if faults:
        _fail(f"{root} is damaged: " + "; ".join(faults))
    if not entries or entries[-1].step != STEPS:
        _fail(f"the newest checkpoint of {root} should be step {STEPS}, but there are {[e.step for e in entries]}")
    return Final(manifest=repository.manifest(entries[-1]), verified=len(entries))


def _prove_identical(a: Manifest, b: Manifest) -> Iterator[str]:
    changes = difference(a, b)
    if changes.added or changes.removed or changes.reshaped:
        _fail(f"the checkpoints hold other tensors: {[*changes.added, *changes.removed, *changes.reshaped]}")
    if set(a.components) != set(b.components):
        _fail(f"the checkpoints hold other components: {sorted(a.components)} and {sorted(b.components)}")
    for what, components in {
        "weights": ("model",),
        "optimizer moments": ("optimizer",),
        "learning-rate schedule": ("scheduler",),
        "random streams (Python, NumPy, torch)": ("rng",),
        "order of the data, and the place in it": ("windows",),
        f"loss curve of {STEPS} steps": ("progress",),
    }.items():
        yield f"{what}: identical ({_prove_equal(a, b, components, changes.changed)})"


def _prove_equal(a: Manifest, b: Manifest, components: Iterable[str], changed: Iterable[str]) -> str:
    tensors: list[Tensor] = []
    for name in components:
        if name not in a.components:
            _fail(f"the checkpoints have no component {name!r}")
        different = [tensor for tensor in changed if tensor.startswith(f"{name}/")]
        if different:
            _fail(f"{len(different)} tensors of {name!r} differ, among them {different[0]!r}")
        if bytes(a.components[name].values) != bytes(b.components[name].values):
            _fail(f"the values of {name!r} differ")
        tensors += [tensor for tensor in a.tensors if tensor.name.startswith(f"{name}/")]
    if not tensors:
        return "its values"
    count = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
    return f"{count}, {sum(tensor.nbytes for tensor in tensors):,} bytes, and its values"


def _fail(why: str) -> NoReturn:
    raise click.ClickException(f"the demo failed: {why}")


# ------------------------------------------------------------------ showing


def _tick(console: Console, line: str) -> None:
    # A Windows console of an old code page has no check mark.
    mark = "✓" if "utf" in console.encoding.lower() else "ok"
    console.print(Text.assemble((mark, "green"), f" {line}"))


def _what_next(folder: Path | None) -> str:
    if folder is None:
        return "The files were removed; 'ckptman demo DIR' keeps them."
    root = shlex.quote(str(folder / "interrupted"))
    return "Look around:\n" + "\n".join(f"  ckptman {verb} {root}" for verb in ("ls", "show", "verify", "log"))
