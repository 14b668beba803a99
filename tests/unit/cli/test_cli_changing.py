"""Commands that change a root: tag, untag, delete, prune, gc, repair."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from cli_roots import Run, everything, flip, one_of, unfinished

from ckptman import CheckpointManager
from ckptman.cli._changing import freeable_nbytes
from ckptman.repository import keep
from ckptman.repository.changes import pruning
from ckptman.repository.repository import Repository
from ckptman.storage.local import LocalStorage

DESTRUCTIVE = {
    "prune": ("prune", "{root}", "--last", "1"),
    "delete": ("delete", "{root}", "20"),
    "gc": ("gc", "{root}"),
    "repair": ("repair", "{root}"),
}
TAGGING = {"tag": ("tag", "{root}", "20", "good"), "untag": ("untag", "{root}", "10", "first")}


def words_for(command: str, root: Path) -> list[str]:
    return [word.format(root=root) for word in (DESTRUCTIVE | TAGGING)[command]]


def steps(run: Run, root: Path) -> list[int]:
    return [one["step"] for one in run("ls", root, "--json").document["checkpoints"]]


def give_work(command: str, root: Path) -> None:
    """Make sure that *command* has something to do."""
    if command == "gc":
        unfinished(root)
    if command == "repair":
        (root / "ckptman.json").unlink()


def test_tags_come_move_and_go(run: Run, root: Path) -> None:
    """A tag is on one checkpoint at a time; taking away what is not there is exit 3."""
    assert run("tag", root, "latest", "good").out == "step 30 is tagged good\n"
    assert run("tag", root, "20", "good").out == "step 20 is tagged good (moved from step 30)\n"
    assert run("tag", root, "20", "b", "--json").document == {
        "schema": 1, "root": str(root), "step": 20, "tags": ["good", "b"],
    }  # fmt: skip
    assert {one["step"]: one["tags"] for one in run("ls", root, "--json").document["checkpoints"]} == {
        10: ["first"], 20: ["good", "b"], 30: [],
    }  # fmt: skip
    assert run("untag", root, "good", "good", "--json").document["tags"] == ["b"]
    assert run("untag", root, "20", "good").code == 3
    assert run("tag", root, "21", "good").code == 3
    assert steps(run, root) == [10, 20, 30]


def test_tagging_twice_commits_once(run: Run, root: Path) -> None:
    """A tag that is there already needs no change, and makes none."""
    before = everything(root)
    assert run("tag", root, "10", "first").code == 0
    assert everything(root) == before


@pytest.mark.parametrize("name", ["latest", "12", "a/b", ".hidden", "x" * 65])
def test_names_that_cannot_be_tags(run: Run, root: Path, name: str) -> None:
    """They are wrong usage, and nothing is written."""
    before = everything(root)
    assert run("tag", root, "10", name).code == 2
    assert everything(root) == before


def test_prune_keeps_what_rules_keep(run: Run, root: Path) -> None:
    """Rules add up; the latest and the tagged checkpoints stay whatever they say; the bytes really go."""
    gone = one_of(root, "step-000000000020.*")
    nbytes = sum(path.stat().st_size for path in gone.iterdir())
    assert run("prune", root, "--best", "loss:1:max", "--last", 1, "--yes", "--json").document == {
        "schema": 1, "root": str(root), "dropped": [], "freed_nbytes": 0,
    }  # fmt: skip
    assert run("prune", root, "--best", "loss:1", "--yes", "--json").document == {
        "schema": 1, "root": str(root), "dropped": [20], "freed_nbytes": nbytes,
    }  # fmt: skip
    assert steps(run, root) == [10, 30]
    assert not gone.exists()


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (("--every", "10"), [10, 20, 30]),
        (("--every", "20"), [20, 30]),
        (("--hours", "1e9"), [30]),
        (("--days", "1e9"), [30]),
        (("--last", "2"), [20, 30]),
        (("--best", "loss:1:max", "--best", "loss:1:min"), [10, 20, 30]),
    ],
)
def test_every_rule_of_prune(run: Run, root: Path, rule: tuple[str, ...], kept: list[int]) -> None:
    """What each rule keeps, with nothing tagged."""
    assert run("untag", root, "10", "first").code == 0
    assert run("prune", root, *rule, "--yes").code == 0
    assert steps(run, root) == kept


@pytest.mark.parametrize(
    "rule",
    [
        (),
        ("--last", "0"),
        ("--best", "loss"),
        ("--best", "loss:0"),
        ("--best", ":1"),
        ("--hours", "0"),
        ("--days", "nan"),
        ("--hours", "inf"),
        ("--last", "1", "--lock-timeout", "nan"),
    ],
)
def test_rules_that_prune_refuses(run: Run, root: Path, rule: tuple[str, ...]) -> None:
    """No rule, or a wrong one, is wrong usage: nothing is deleted."""
    assert run("prune", root, *rule, "--yes").code == 2
    assert steps(run, root) == [10, 20, 30]


def test_delete_takes_exactly_what_was_named(run: Run, root: Path) -> None:
    """Tagged ones too; if one of several does not exist, none is deleted."""
    assert run("delete", root, "10", "11", "--yes").code == 3
    assert steps(run, root) == [10, 20, 30]
    ran = run("delete", root, "first", "30", "--yes", "--json")
    assert ran.document["dropped"] == [10, 30]
    assert ran.document["freed_nbytes"] > 100
    assert steps(run, root) == [20]
    assert run("delete", root, "20", "--yes").out.startswith("deleted 1 checkpoint (step 20), freed ")
    assert run("latest", root).code == 3
    assert len(list(root.glob("step-*"))) == 0


def test_what_is_borrowed_is_not_freed(made_root: Path) -> None:
    """Files that a remaining checkpoint borrows from one that goes are not counted as freed."""
    storage = LocalStorage(made_root)
    first, *_, last = Repository(storage).entries()
    key = f"{first.attempt}/weights.safetensors"
    whole = freeable_nbytes(storage, [last], [first.attempt, last.attempt])
    borrowing = msgspec.structs.replace(last, borrows=(key,))
    assert freeable_nbytes(storage, [borrowing], [first.attempt, last.attempt]) == whole - storage.size(key)


def test_pruning_drops_only_what_was_shown(made_root: Path) -> None:
    """A checkpoint that came after the plan was made stays, though the rule would drop it."""
    entries = Repository(LocalStorage(made_root)).entries()
    change = pruning(keep.last(1), "", attempts={entries[0].attempt})
    untagged = tuple(msgspec.structs.replace(entry, tags=()) for entry in entries)
    assert [entry.step for entry in change(untagged)] == [20, 30]


def test_gc_frees_unfinished_saves_only(run: Run, root: Path) -> None:
    """It reports the bytes that it freed; foreign files stay; a root without garbage is left alone."""
    (root / "notes.txt").write_text("mine")
    before = everything(root)
    assert run("gc", root).code == 0
    assert everything(root) == before
    name = unfinished(root, nbytes=12345)
    assert run("gc", root, "--yes", "--json").document == {
        "schema": 1, "root": str(root), "attempts": [name], "freed_nbytes": 12345,
    }  # fmt: skip
    assert not (root / name).exists()
    assert (root / "notes.txt").read_text() == "mine"
    assert run("verify", root).code == 0


def test_repair_of_a_damaged_record(run: Run, torn: Path) -> None:
    """The checkpoint that the damaged record had added is listed again; a second repair finds nothing."""
    assert run("repair", torn, "--yes", "--json").document == {
        "schema": 1, "root": str(torn), "marker": None, "damaged_records": [4], "adopted": [30], "incomplete": [],
    }  # fmt: skip
    assert steps(run, torn) == [10, 20, 30]
    ran = run("repair", torn)
    assert ran.code == 0
    assert "nothing to repair" in ran.err


def test_repair_of_a_lost_catalog(run: Run, root: Path) -> None:
    """Without any record, readers refuse and name the cure; repair lists all checkpoints again."""
    for record in (root / "catalog").iterdir():
        record.unlink()
    (root / "ckptman.json").write_text("{")
    ran = run("ls", root, "--json")
    assert ran.code == 4
    assert "ckptman repair" in ran.failure["message"]
    ran = run("repair", root, "--yes")
    assert ran.code == 0
    assert "checkpoints are listed again: 10, 20, 30" in ran.out
    assert steps(run, root) == [10, 20, 30]
    assert run("verify", root).code == 0


def test_repair_says_what_it_gives_up(run: Run, torn: Path) -> None:
    """A checkpoint that is damaged itself cannot be listed again: it is named before its files go."""
    manifest = one_of(torn, "step-000000000030.*/manifest.json")
    flip(manifest, 500)
    ran = run("repair", torn)
    assert ran.code == 2
    assert f"{manifest.parent.name} is incomplete or damaged: its files are deleted" in ran.err
    assert manifest.exists()
    assert run("repair", torn, "--yes", "--json").document["incomplete"] == [manifest.parent.name]
    assert not manifest.exists()


def test_a_prune_after_a_damaged_record_sees_what_is_adopted(run: Run, torn: Path) -> None:
    """Step 30, whose record is damaged, counts as the latest: pruning shows, and drops, step 20."""
    ran = run("prune", torn, "--last", "1", "--yes", "--json")
    assert ran.document["dropped"] == [20]
    assert len(ran.err.splitlines()) == 1  # warned of once, however often the catalog was read
    assert steps(run, torn) == [10, 30]


@pytest.mark.parametrize("command", DESTRUCTIVE)
def test_nothing_is_destroyed_unasked(run: Run, root: Path, command: str) -> None:
    """Without a terminal and without --yes: exit 2, the plan on stderr, and not a byte has changed."""
    give_work(command, root)
    before = everything(root)
    ran = run(*words_for(command, root))
    assert ran.code == 2
    assert ran.err.startswith("would ")
    assert "--yes" in ran.err
    assert not ran.out
    ran = run(*words_for(command, root), "--json")
    assert ran.code == 2
    assert ran.failure["error"] == "UsageError"
    assert everything(root) == before


@pytest.mark.parametrize("command", [*DESTRUCTIVE, *TAGGING])
def test_a_live_writer_is_respected(run: Run, held: Path, command: str) -> None:
    """While another process holds the lock: exit 5 after the timeout, and no checkpoint was touched."""
    give_work(command, held)
    sure = ["--yes"] if command in DESTRUCTIVE else []
    ran = run(*words_for(command, held), *sure, "--lock-timeout", "0", "--json")
    assert ran.code == 5
    assert ran.failure["error"] == "LockTimeout"
    assert steps(run, held) == [10, 20, 30]
    assert run("log", held, "--json").document["records"][-1]["change"] == "save step 30"


@pytest.mark.parametrize("command", [*DESTRUCTIVE, *TAGGING])
def test_no_writer_creates_a_root(run: Run, tmp_path: Path, command: str) -> None:
    """A path with a typo: exit 3, and nothing is made there."""
    sure = ["--yes"] if command in DESTRUCTIVE else []
    assert run(*words_for(command, tmp_path / "typo"), *sure).code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_manager_goes_on_after_the_command_line(run: Run, root: Path) -> None:
    """What the commands leave is a root like any other: a new manager saves, and everything verifies."""
    run("tag", root, "20", "good")
    run("prune", root, "--last", "1", "--yes")
    with CheckpointManager(root, {"x": {"a": 1}}, rng=False) as manager:
        manager.save(40, block=True)
    assert steps(run, root) == [10, 20, 30, 40]
    assert run("verify", root).code == 0


def test_gc_leaves_a_lender_alone(run: Run, tmp_path: Path) -> None:
    """The folder of a dropped checkpoint whose file is still lent is no unfinished save."""
    root = tmp_path / "root"
    state = {"frozen": torch.rand(1 << 20), "x": torch.zeros(1)}
    with CheckpointManager(root, state) as manager:
        manager.save(1, block=True)
        manager.save(2, block=True)
        manager.delete(1)
    assert (root / "writer.lock").exists()
    assert len(list(root.glob("step-*"))) == 2, "the file of step 1 is lent to step 2"
    before = everything(root)
    assert run("gc", root, "--yes").err == "nothing to free\n"
    assert everything(root) == before
