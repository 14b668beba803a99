"""``ckptman cp``: what it prints, what it exits with, and that it changes nothing where there is nothing to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_roots import Run, everything, flip, one_of

from ckptman import CheckpointManager


def listed(run: Run, root: Path) -> list[dict[str, object]]:
    """What ``ls`` says, but for where the checkpoints lie and what they wrote themselves."""
    document = run("ls", root, "--json").document
    return [{k: v for k, v in one.items() if k not in ("url", "new_nbytes")} for one in document["checkpoints"]]


def test_a_whole_root(run: Run, root: Path, tmp_path: Path) -> None:
    """Into a folder that does not exist: the same list, intact; the second time nothing at all is changed."""
    target = tmp_path / "new" / "target"
    ran = run("cp", root, target)
    assert ran.code == 0
    assert ran.out.startswith("copied 3 checkpoints (steps 10, 20, 30), sent ")
    assert ran.err == ""
    assert listed(run, target) == listed(run, root)
    assert run("verify", target).code == 0
    before = everything(target)
    ran = run("cp", root, target)
    assert (ran.code, ran.out, ran.err) == (0, "", "nothing was copied: 3 checkpoints there already\n")
    assert everything(target) == before


def test_several_by_name(run: Run, root: Path, tmp_path: Path) -> None:
    """By step, tag and word, in the order of the source, each once; the document tells what became of each."""
    target = tmp_path / "target"
    words = ("--step", "latest", "--step", "first", "--step", 30)
    document = run("cp", root, target, *words, "--json").document
    assert document["source"] == str(root)
    assert document["root"] == str(target)
    assert [(one["step"], one["outcome"], one["what"]) for one in document["checkpoints"]] == [
        (10, "copied", None), (30, "copied", None),
    ]  # fmt: skip
    assert all(one["sent_nbytes"] > 0 for one in document["checkpoints"])
    document = run("cp", root, target, "--json").document
    assert [one["outcome"] for one in document["checkpoints"]] == ["there", "copied", "there"]
    assert [one["step"] for one in listed(run, target)] == [10, 20, 30]


def test_tags_given_later_are_copied_alone(run: Run, root: Path, tmp_path: Path) -> None:
    """The checkpoint is there, so only its tag goes."""
    target = tmp_path / "target"
    run("cp", root, target)
    run("tag", root, 20, "good")
    assert run("cp", root, target).code == 0
    assert listed(run, target) == listed(run, root)


def test_another_checkpoint_of_the_same_step(run: Run, root: Path, tmp_path: Path) -> None:
    """Refused as wrong usage before anything is copied; --replace replaces it."""
    target = tmp_path / "target"
    with CheckpointManager(target, {"x": torch.ones(1)}) as manager:
        manager.save(20, block=True)
    before = everything(target)
    ran = run("cp", root, target)
    assert ran.code == 2
    assert "other checkpoints at step 20; --replace drops them" in ran.err
    assert everything(target) == before
    assert run("cp", root, target, "--replace").code == 0
    assert listed(run, target) == listed(run, root)


def test_damage_is_named_and_left_out(run: Run, damaged: Path, tmp_path: Path) -> None:
    """The others are copied; exit 4."""
    target = tmp_path / "target"
    ran = run("cp", damaged, target)
    assert ran.code == 4
    assert "damaged, and not copied: step 20: step-000000000020" in ran.out
    assert [one["step"] for one in listed(run, target)] == [10, 30]
    assert run("verify", target).code == 0
    outcomes = run("cp", damaged, target, "--step", 20, "--json").document["checkpoints"]
    assert [one["outcome"] for one in outcomes] == ["damaged"]
    assert "weights" in outcomes[0]["what"]


def test_a_flip_in_what_is_borrowed_or_in_a_manifest(run: Run, root: Path, tmp_path: Path) -> None:
    """Every file of a checkpoint counts."""
    flip(one_of(root, "step-000000000010.*/manifest.json"), 100)
    assert run("cp", root, tmp_path / "target", "--step", 10).code == 4


def test_what_is_not_there(run: Run, root: Path, tmp_path: Path) -> None:
    """No such root, no such step: exit 3, and the destination is not made."""
    target = tmp_path / "target"
    assert run("cp", tmp_path / "nothing", target).code == 3
    assert run("cp", root, target, "--step", 40).code == 3
    assert not target.exists()


def test_the_same_root(run: Run, root: Path) -> None:
    """Wrong usage, by whatever name."""
    (root.parent / "link").symlink_to(root)
    for other in (root, root.parent / "link", f"file://{root}"):
        assert run("cp", root, other).code == 2


def test_a_live_writer(run: Run, held: Path, tmp_path: Path) -> None:
    """At the source it is no hindrance; at the destination it is exit 5."""
    assert run("cp", held, tmp_path / "target").code == 0
    with CheckpointManager(tmp_path / "other", {"x": torch.ones(1)}) as manager:
        manager.save(1, block=True)
    before = everything(held)
    assert run("cp", tmp_path / "other", held, "--lock-timeout", 0).code == 5
    assert everything(held) == before


@pytest.mark.parametrize("json", [(), ("--json",)])
def test_a_checkpoint_that_is_dropped_meanwhile(
    run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, json: tuple[str, ...]
) -> None:
    """It is said, and the others are copied."""
    from ckptman.cli import cp as module

    begin = module.begin

    def dropping(*args, **kwargs):  # type: ignore[no-untyped-def]
        with CheckpointManager(root, {}) as manager:
            manager.delete(20)
        return begin(*args, **kwargs)

    monkeypatch.setattr(module, "begin", dropping)
    ran = run("cp", root, tmp_path / "target", *json)
    assert ran.code == 0
    if json:
        assert [one["outcome"] for one in ran.document["checkpoints"]] == ["copied", "gone", "copied"]
    else:
        assert "step 20 was dropped while it was copied" in ran.err
    assert [one["step"] for one in listed(run, tmp_path / "target")] == [10, 30]
