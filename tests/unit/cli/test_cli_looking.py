"""Commands that look: ls, latest, show, verify, log, and what they do with roots that are missing or damaged."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from cli_roots import Run, everything, flip, one_of

from ckptman.format.catalog import read_record
from ckptman.format.digest import sha256
from ckptman.format.sealed import seal

READERS = ("ls", "latest", "show", "verify", "log")


def test_ls_lists_oldest_first(run: Run, made_root: Path) -> None:
    """The table has a row per checkpoint in the order of commits; the document has every promised field."""
    rows = run("ls", made_root).out.splitlines()
    assert [row.split()[0] for row in rows] == ["step", "10", "20", "30"]
    assert "loss=0.1" in rows[1]
    assert "first" in rows[1]

    document = run("ls", made_root, "--json").document
    assert document.keys() == {"schema", "root", "checkpoints"}
    assert document["root"] == str(made_root)
    first, _, last = document["checkpoints"]
    assert first["step"] == 10
    assert first["tags"] == ["first"]
    assert first["metrics"] == {"loss": 0.1}
    assert first["nbytes"] == first["new_nbytes"] == (8 + 3 + 5) * 4
    assert first["world_size"] == 1
    assert first["url"] == str(one_of(made_root, "step-000000000010.*"))
    assert datetime.fromisoformat(first["created_at"]).tzinfo == UTC
    assert last["metrics"] == {"loss": "nan"}
    assert len(first) == 8


def test_latest_is_for_scripts(run: Run, made_root: Path) -> None:
    """Bare, it prints the step and nothing else; as JSON, one checkpoint and whether it was preempted."""
    assert run("latest", made_root).out == "30\n"
    document = run("latest", made_root, "--json").document
    assert document["step"] == 30
    assert document["preempted"] is False
    assert document.keys() == {*run("ls", made_root, "--json").document["checkpoints"][0], "schema", "preempted"}


@pytest.mark.parametrize(
    ("which", "step"), [("10", 10), ("latest", 30), ("first", 10), ("best:loss", 10), ("best:loss:max", 20)]
)
def test_show_takes_every_kind_of_step(run: Run, made_root: Path, which: str, step: int) -> None:
    """A step, ``latest``, the best by a metric, and a tag all name a checkpoint."""
    assert run("show", made_root, which, "--json").document["step"] == step


def test_show_document(run: Run, made_root: Path) -> None:
    """Tensors with type, shape, size and file; values as they are encoded; files with sizes; components with kinds."""
    document = run("show", made_root, "20", "--json").document
    folder = one_of(made_root, "step-000000000020.*").name
    assert document["tensors"] == [
        {"name": f"weights/{name}", "dtype": "float32", "shape": shape, "nbytes": nbytes, "file": file}
        for name, shape, nbytes in (("w", [4, 2], 32), ("same", [5], 20), ("new", [2], 8))
        for file in [f"{folder}/weights.safetensors"]
    ]
    assert document["components"] == {"weights": "container", "trainer": "container", "note": "value"}
    assert document["values"]["trainer"] == {
        "state": {"epoch": 20, "names": ["a", "b"], "pair": {"$": "tuple", "v": [1, 2]}}
    }
    (file,) = document["files"]
    assert file == {
        "path": f"{folder}/weights.safetensors",
        "nbytes": (made_root / folder / "weights.safetensors").stat().st_size,
    }
    assert document["aliases"] == {}
    assert "torch" in document["environment"]


def test_show_is_readable(run: Run, made_root: Path) -> None:
    """Facts, tables and values, in plain text; but for the root's path no line is wider than 80 columns."""
    text = run("show", made_root).out
    assert re.search(r"^weights/w +float32 +4 × 2 +32 B +weights\.safetensors$", text, re.MULTILINE)
    assert re.search(r"^trainer +container +0 +0 B$", text, re.MULTILINE)
    assert '"names": ["a", "b"],' in text
    assert 'note: "hello"' in text
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("folder")) <= 80


def test_log_tells_the_history(run: Run, made_root: Path) -> None:
    """Every record with number, time, change and writer, oldest first."""
    assert [row.split()[0] for row in run("log", made_root).out.splitlines()] == ["record", "1", "2", "3", "4"]
    records = run("log", made_root, "--json").document["records"]
    assert [one["change"] for one in records] == ["take over", "save step 10", "save step 20", "save step 30"]
    assert [one["number"] for one in records] == [1, 2, 3, 4]
    assert records[0]["writer"].keys() == {"host", "pid", "epoch"}
    assert records[0]["damaged"] is False
    assert datetime.fromisoformat(records[0]["committed_at"]).tzinfo == UTC


def test_verify_of_an_intact_root(run: Run, made_root: Path) -> None:
    """All checkpoints or one; exit 0."""
    ran = run("verify", made_root)
    assert ran.code == 0
    assert ran.out.endswith("3 checkpoints and the catalog intact\n")
    assert run("verify", made_root, "first", "--json").document == {
        "schema": 1,
        "root": str(made_root),
        "ok": True,
        "catalog": {"ok": True, "faults": []},
        "checkpoints": [{"step": 10, "ok": True, "faults": []}],
    }


def test_verify_names_the_damage(run: Run, damaged: Path) -> None:
    """A flipped bit: exit 4, with the file and the tensor; the other checkpoints are said to be intact."""
    ran = run("verify", damaged)
    assert ran.code == 4
    assert "weights.safetensors is damaged: tensor 'weights/new'" in ran.out
    ran = run("verify", damaged, "--json")
    assert ran.code == 4
    assert not ran.document["ok"]
    verdicts = {one["step"]: one for one in ran.document["checkpoints"]}
    (fault,) = verdicts[20]["faults"]
    assert fault["tensor"] == "weights/new"
    assert fault["file"].endswith("/weights.safetensors")
    assert "step 20" in fault["what"]
    assert [step for step, one in verdicts.items() if one["ok"]] == [10, 30]
    assert run("verify", damaged, 10).code == 0


def test_a_damaged_manifest(run: Run, root: Path) -> None:
    """It keeps a checkpoint from being shown and from passing verification: exit 4 both times."""
    flip(one_of(root, "step-000000000030.*/manifest.json"), 500)
    ran = run("show", root, "--json")
    assert ran.code == 4
    assert ran.failure["error"] == "IntegrityError"
    assert run("verify", root).code == 4
    assert run("ls", root).code == 0


def test_a_damaged_newest_record(run: Run, torn: Path) -> None:
    """It is passed over with one warning on stderr; ``log`` marks it, ``verify`` calls it damage."""
    ran = run("ls", torn, "--json")
    assert [one["step"] for one in ran.document["checkpoints"]] == [10, 20]
    (warning,) = ran.err.splitlines()
    assert warning.startswith("warning: catalog record 4")
    assert run("latest", torn).out == "20\n"
    last = run("log", torn, "--json").document["records"][-1]
    assert last == {"number": 4, "committed_at": None, "change": None, "writer": None, "damaged": True}
    assert "(this record is damaged)" in run("log", torn).out
    ran = run("verify", torn, "--json")
    assert ran.code == 4
    assert ran.document["catalog"]["faults"][0]["file"] == "catalog/000000000004.json"
    assert all(one["ok"] for one in ran.document["checkpoints"])


def test_verify_checks_the_chain(run: Run, root: Path) -> None:
    """A record that is whole, but not what its successor was built on, is found."""
    path = root / "catalog/000000000002.json"
    record = read_record(path.read_bytes(), 2)
    path.write_bytes(seal(msgspec.structs.replace(record, change="save step 11")))
    ran = run("verify", root, "--json")
    assert ran.code == 4
    assert [fault["file"] for fault in ran.document["catalog"]["faults"]] == ["catalog/000000000003.json"]


@pytest.mark.parametrize("how", ["gone", "torn"])
def test_verify_checks_the_marker(run: Run, root: Path, how: str) -> None:
    """A marker that is missing or unreadable is damage of the catalog."""
    (root / "ckptman.json").unlink()
    if how == "torn":
        (root / "ckptman.json").write_text("{")
    ran = run("verify", root, "--json")
    assert ran.code == 4
    assert [fault["file"] for fault in ran.document["catalog"]["faults"]] == ["ckptman.json"]


@pytest.mark.parametrize("command", READERS)
def test_a_newer_format(run: Run, root: Path, command: str) -> None:
    """A root that a newer ckptman wrote is refused: exit 4, and the message says so."""
    newest = sorted((root / "catalog").iterdir())[-1].read_bytes()
    record = read_record(newest, 4)
    newer = msgspec.structs.replace(record, format=2, number=5, previous=sha256(newest))
    (root / "catalog/000000000005.json").write_bytes(seal(newer))
    ran = run(command, root, "--json")
    assert ran.code == 4
    assert ran.failure["error"] == "FormatError"
    assert "install a newer ckptman" in ran.failure["message"]


@pytest.mark.parametrize("exists", [False, True], ids=["missing", "empty"])
@pytest.mark.parametrize(("command", "code"), [("ls", 0), ("latest", 3), ("show", 3), ("verify", 3), ("log", 0)])
def test_no_root(run: Run, tmp_path: Path, command: str, code: int, exists: bool) -> None:
    """Where nothing was saved yet: an empty list or exit 3. Nothing is created."""
    root = tmp_path / "none"
    if exists:
        root.mkdir()
    assert run(command, root).code == code
    ran = run(command, root, "--json")
    assert ran.code == code
    if code:
        assert ran.failure["error"] == "CheckpointNotFound"
    else:
        assert ran.document["checkpoints" if command == "ls" else "records"] == []
    assert list(tmp_path.rglob("*")) == ([root] if exists else [])


@pytest.mark.parametrize("command", READERS)
def test_readers_change_nothing(run: Run, root: Path, command: str) -> None:
    """After each of them, every file and folder has its size and its time of change."""
    before = everything(root)
    assert run(command, root).code == 0
    assert everything(root) == before
    assert len(before) > 10


@pytest.mark.parametrize("command", READERS)
def test_a_file_is_no_root(run: Run, tmp_path: Path, command: str) -> None:
    """One line says what is wrong."""
    (tmp_path / "file").write_text("no root")
    ran = run(command, tmp_path / "file")
    assert ran.code == 1
    assert re.fullmatch(r"error: .*is the root itself a file\?.*\n", ran.err)


def test_no_such_step(run: Run, made_root: Path) -> None:
    """Steps, tags and metrics that nobody has: exit 3."""
    for which in ("11", "nobody", "best:accuracy:max", "9" * 30):
        ran = run("show", made_root, which)
        assert ran.code == 3
        assert ran.err.startswith("error: ")
        assert not ran.out
    assert run("verify", made_root, 11).code == 3
    assert run("diff", made_root, 10, 11).code == 3


def test_the_root_may_come_from_the_environment(run: Run, made_root: Path) -> None:
    """``-`` always, and where ROOT would be the only argument it may be left out; without it, exit 2."""
    env = {"CKPTMAN_ROOT": str(made_root)}
    for words in (("latest", "-"), ("latest",)):
        assert run(*words, env=env).out == "30\n"
    assert run("show", "-", "first", "--json", env=env).document["step"] == 10
    for words in (("latest", "-"), ("latest",), ("show",), ("ls", "-")):
        ran = run(*words)
        assert ran.code == 2
        assert "CKPTMAN_ROOT" in ran.err
