"""The demo, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest

from ckptman.cli.demo import _prove_identical
from ckptman.repository.repository import Repository
from ckptman.repository.verify import verify
from ckptman.storage.local import LocalStorage

PROOFS = [
    "in the middle of saving step 320",
    "nothing was committed, and the newest checkpoint is step 240",
    "the same command again resumed at step 240 and went on to step 480",
    "the control run went from step 0 to step 480",
    "every byte of all 6 checkpoints was read again",
    "weights: identical",
    "optimizer moments: identical",
    "learning-rate schedule: identical",
    "random streams (Python, NumPy, torch): identical",
    "order of the data, and the place in it: identical",
    "loss curve of 480 steps: identical",
]


def demo(*arguments: str, limit_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from ckptman.cli.demo import demo; demo()", *arguments]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=limit_s, check=False
    )


def steps(root: Path) -> list[int]:
    """The checkpoints of *root*, each of them verified."""
    repository = Repository(LocalStorage(root))
    entries = repository.entries()
    assert [fault for entry in entries for fault in verify(repository, entry)] == []
    return [entry.step for entry in entries]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that does not exist yet."""
    return tmp_path_factory.mktemp("demo") / "new" / "place"


@pytest.fixture(scope="module")
def ran(place: Path) -> subprocess.CompletedProcess[str]:
    """The demo, run in *place* once for all tests."""
    return demo(str(place))


@pytest.mark.timeout(400)
def test_the_demo_proves_what_it_says(ran: subprocess.CompletedProcess[str]) -> None:
    """Killed in mid-save and resumed, the run ends bit-identical, and the demo says so, uncoloured in a pipe."""
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [proof for proof in PROOFS if proof not in ran.stdout] == []
    assert ran.stdout.count("✓ ") == 10
    assert "\x1b" not in ran.stdout


@pytest.mark.timeout(400)
def test_both_roots_are_left_behind_intact(ran: subprocess.CompletedProcess[str], place: Path) -> None:
    """Every checkpoint of both roots verifies; the interrupted one had two writers, and keeps nothing torn."""
    assert f"ckptman ls {place}/interrupted" in ran.stdout
    assert steps(place / "interrupted") == [320, 400, 480]
    assert steps(place / "control") == [320, 400, 480]
    writers = [len(list((place / name).glob("step-*.w0002.*"))) for name in ("interrupted", "control")]
    assert writers == [3, 0]
    assert list((place / "interrupted").glob("step-*320.w0001.*")) == []


@pytest.mark.timeout(400)
def test_what_differs_fails_the_comparison(ran: subprocess.CompletedProcess[str], place: Path) -> None:
    """Of two steps every single comparison fails, and says what differs: none of them passes whatever it is given."""
    assert ran.returncode == 0
    repository = Repository(LocalStorage(place / "control"))
    older, newer = (repository.manifest(entry) for entry in repository.entries()[-2:])
    for component in older.components:
        other = msgspec.structs.replace(
            newer,
            components={**newer.components, component: older.components[component]},
            tensors=tuple(t for t in older.tensors if t.name.startswith(f"{component}/"))
            + tuple(t for t in newer.tensors if not t.name.startswith(f"{component}/")),
        )
        with pytest.raises(click.ClickException, match=f"'{component}'") as caught:
            list(_prove_identical(newer, other))
        assert caught.value.exit_code == 1
    assert len(list(_prove_identical(newer, newer))) == len(newer.components) == 6


def test_the_demo_refuses_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    """Nothing of the user's is mixed up with the demo's: exit 2, a clear sentence, and nothing is touched."""
    (tmp_path / "mine.txt").write_text("precious")
    ran = demo(str(tmp_path))
    assert ran.returncode == 2
    assert "is not empty: give a new or empty directory" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
