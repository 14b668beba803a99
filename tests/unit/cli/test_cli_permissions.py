"""The command line of a user who may not do everything: one line that says what to look at, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_roots import everything

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes capabilities away from root by setpriv")

LOOKING = {
    "ls": ("ls", "{root}"),
    "latest": ("latest", "{root}"),
    "show": ("show", "{root}", "--json"),
    "verify": ("verify", "{root}"),
    "log": ("log", "{root}"),
    "report": ("report", "{root}", "-o", "{out}/page.html"),
    "cp from it": ("cp", "{root}", "{out}/copy"),
}
CHANGING = {
    "tag": ("tag", "{root}", "20", "good"),
    "untag": ("untag", "{root}", "10", "first"),
    "prune": ("prune", "{root}", "--last", "1", "--yes"),
    "delete": ("delete", "{root}", "20", "--yes"),
    "cp below it": ("cp", "{other}", "{root}/below"),
}
DOCTOR = {"doctor": ("doctor", "{root}")}
# not here, since they take seconds to load torch and open a root as the others do: diff, import, export

PROGRAM = """
import contextlib, io, json, sys
from ckptman.cli._group import ckptman
told = {}
for name, words in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ckptman.main(words)
        except SystemExit as end:
            code = end.code
    told[name] = [code, out.getvalue(), err.getvalue()]
json.dump(told, sys.stdout)
"""
"""Runs commands one after the other, each as a process would: what is no error of ours or click's ends it."""


def unprivileged(commands: dict[str, tuple[str, ...]], root: Path, tmp_path: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each of *commands*, run by somebody for whom modes of files hold."""
    prefix: list[str] = []
    if os.geteuid() == 0:  # root may do everything by two capabilities, so it is run without any
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv")
        prefix = ["setpriv", "--bounding-set=-all"]
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    places = {"root": root, "out": out, "other": other}
    words = {name: [word.format(**places) for word in line] for name, line in commands.items()}
    ran = subprocess.run(
        [*prefix, sys.executable, "-c", PROGRAM, json.dumps(words)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return {name: (code, told_out, told_err) for name, (code, told_out, told_err) in json.loads(ran.stdout).items()}


def sealed(folder: Path, mode: int) -> None:
    """Set *mode* for all folders from *folder* on down; files lose what *folder* does not have."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.chmod(mode if path.is_dir() else mode & 0o444)
    folder.chmod(mode)


@pytest.fixture
def reopened(tmp_path: Path) -> Iterator[None]:
    """Gives the modes back, so that pytest can remove what a test has made."""
    yield
    for path in (tmp_path, *tmp_path.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


@pytest.mark.usefixtures("reopened")
def test_a_root_that_may_only_be_read(root: Path, tmp_path: Path) -> None:
    """What looks works; what would change the root fails in one line that names the reason, and changes nothing."""
    shutil.copytree(root, tmp_path / "other")
    sealed(root, 0o555)
    before = everything(root)
    told = unprivileged({**LOOKING, **CHANGING, **DOCTOR}, root, tmp_path)
    assert {name: told[name][0] for name in LOOKING} == dict.fromkeys(LOOKING, 0)
    for name in CHANGING:
        code, out, err = told[name]
        assert (code, out, err.count("\n")) == (1, "", 1), (name, told[name])
        assert err.startswith("error: cannot "), name
        assert "check owner and mode of the folder" in err, name
    assert told["doctor"][0] == 1
    assert "✗  writing" in told["doctor"][1]
    assert "✓  reading" in told["doctor"][1]
    assert everything(root) == before


@pytest.mark.usefixtures("reopened")
@pytest.mark.parametrize("closed", ["root", "parent"])
def test_a_root_that_may_not_be_read(root: Path, tmp_path: Path, closed: str) -> None:
    """Every command fails in one line with exit code 1, ``doctor`` in a table: it is never told as an empty root."""
    shutil.copytree(root, tmp_path / "other")
    parent = tmp_path / "parent"
    parent.mkdir()
    root = Path(shutil.move(root, parent / "root"))
    (root if closed == "root" else parent).chmod(0)
    told = unprivileged({**LOOKING, **CHANGING, **DOCTOR}, root, tmp_path)
    assert told.pop("doctor")[0] == 1
    for name, (code, out, err) in told.items():
        assert (code, out, err.count("\n")) == (1, "", 1), (name, code, out, err)
        assert "check owner and mode of the folder" in err, name


@pytest.mark.parametrize("kind", ["file", "circle"])
def test_a_root_that_is_no_folder(root: Path, tmp_path: Path, kind: str) -> None:
    """A file, or a link that leads to itself, is told as that by every command."""
    root.rename(tmp_path / "other")
    if kind == "file":
        root.write_text("x")
    else:
        root.symlink_to(root)
    told = unprivileged({**LOOKING, **CHANGING, **DOCTOR}, root, tmp_path)
    assert told.pop("doctor")[0] == 1
    for name, (code, out, err) in told.items():
        assert (code, out, err.count("\n")) == (1, "", 1), (name, code, out, err)
        assert ("is the root itself a file?" if kind == "file" else "symbolic link") in err, name
