"""``import`` and ``export`` on the command line: documents, exit codes, and what is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_roots import Run, everything
from safetensors.torch import save_file

from ckptman.convert import export_checkpoint, import_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save({"model": {"w": torch.ones(2, 3)}, "epoch": 4}, tmp_path / "in.pt")
    return tmp_path / "in.pt"


def test_import_and_export(run: Run, source: Path, tmp_path: Path) -> None:
    """What goes in comes out; both commands give documents."""
    root, out = tmp_path / "new", tmp_path / "out.pt"
    document = run("import", root, source, "--step", 7, "--json").document
    assert (document["step"], document["nbytes"]) == (7, 24)
    assert document["components"] == {"model": "module", "epoch": "value"}
    assert document["left_out"] == []
    assert run("latest", root, "--json").document["step"] == 7
    document = run("export", root, "latest", out, "--to", "torch", "--json").document
    assert (document["step"], document["path"], document["nbytes"]) == (7, str(out), out.stat().st_size)
    assert torch.load(out, weights_only=True)["epoch"] == 4
    ran = run("export", root, 7, tmp_path / "w.safetensors", "--to", "safetensors", "--component", "model")
    assert ran.code == 0
    assert ran.out.startswith("exported step 7 to ")
    assert "imported a file of torch.save as step 8" in run("import", root, source, "--step", 8).out


def test_failures_have_their_exit_codes(run: Run, root: Path, source: Path, tmp_path: Path) -> None:
    """A bomb exits 1 and is named, damage 4, a missing step 3, wrong words 2; and the root stays as it was."""
    before = everything(root)
    torch.save({"x": Path("a")}, tmp_path / "bomb.pt")
    (tmp_path / "cut.pt").write_bytes(source.read_bytes()[:-40])
    failure = run("import", root, tmp_path / "bomb.pt", "--step", 1, "--json").failure
    assert (failure["error"], failure["exit_code"]) == ("UnsupportedState", 1)
    assert "pathlib" in failure["message"]
    assert run("import", root, tmp_path / "cut.pt", "--step", 1).code == 4
    assert run("import", root, source).code == 1
    assert run("import", root, source, "--step", 10).code == 1  # exists
    assert run("import", root, source, "--step", 1, "--as", "model").code == 2
    assert run("import", root, tmp_path / "none", "--step", 1).code == 2
    assert run("export", root, 99, tmp_path / "out", "--to", "torch").code == 3
    assert run("export", root, 10, tmp_path / "out", "--to", "nothing").code == 2
    assert run("export", root, 10, source, "--to", "torch").code == 1  # exists
    assert everything(root) == before


def test_weights_alone_are_imported_only_on_request(run: Run, tmp_path: Path) -> None:
    """A directory of the Trainer without its optimizer exits 4, names what is missing and a way that works."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    save_file({"w": torch.ones(2, 3)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    ran = run("import", tmp_path / "new", folder)
    assert ran.code == 4
    assert "optimizer.pt, scheduler.pt, rng_state.pth missing" in ran.err
    assert "--partial" in ran.err
    assert not (tmp_path / "new").exists()
    ran = run("import", tmp_path / "new", folder, "--partial")
    assert ran.code == 0
    assert "left out: optimizer.pt: missing in the source" in ran.err
    assert "as step 3" in ran.out


def test_a_url_is_no_place_for_a_file(run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports and reports go to this machine: a URL is refused, and makes no folder called ``s3:``."""
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    ran = run("export", root, 10, "s3://bucket/out", "--to", "torch")
    assert ran.code == 1
    assert "a URL can only be a root. Nothing was exported" in ran.err
    assert run("report", root, "-o", "s3://bucket/page.html").code == 2
    assert everything(tmp_path) == before


def test_a_live_writer_is_waited_for(run: Run, held: Path, source: Path) -> None:
    """Another process holds the lock: exit 5."""
    assert run("import", held, source, "--step", 1, "--lock-timeout", 0.1).code == 5


def test_damage_exits_4_and_leaves_no_file(run: Run, damaged: Path, tmp_path: Path) -> None:
    """An export reads every byte; what it finds damaged it does not write."""
    ran = run("export", damaged, 20, tmp_path / "out.safetensors", "--to", "safetensors")
    assert ran.code == 4
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("to", ["torch", "safetensors", "dcp", "hf"])
def test_progress_counts_every_byte(to: str, tmp_path: Path) -> None:
    """It never goes back, and ends with all of them: also over several files of weights."""
    config = tmp_path / "config.json"
    config.write_text("{}")
    model = {"a": torch.ones(40, 10), "b": torch.ones(30, 10), "c": torch.ones(7)}
    torch.save({"model": model, "epoch": 4}, tmp_path / "in.pt")
    read: list[tuple[int, int]] = []
    import_checkpoint(tmp_path / "root", tmp_path / "in.pt", step=1, progress=lambda *told: read.append(told))
    written: list[tuple[int, int]] = []
    options = {"config": config, "shard_nbytes": 1500} if to == "hf" else {}
    told = lambda *told: written.append(told)
    export_checkpoint(tmp_path / "root", 1, tmp_path / "out", to=to, progress=told, **options)
    for steps, nbytes in ((written, 4 * (400 + 300 + 7)), (read, read[-1][0])):
        assert steps == sorted(steps)
        assert {total for _, total in steps} == {nbytes}
        assert steps[-1] == (nbytes, nbytes)
    assert len(written) == 3


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
def test_a_bar_on_a_terminal_only(source: Path, tmp_path: Path) -> None:
    """Import and export draw a bar on stderr where that is a terminal, and none with ``--json``."""

    def on_a_terminal(*words: object) -> bytes:
        import pty

        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "ckptman", *map(str, words)]
        subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, check=True, timeout=60)
        os.close(theirs)
        try:
            return os.read(ours, 1 << 16)
        except OSError:  # how Linux tells that nothing was written
            return b""
        finally:
            os.close(ours)

    root = tmp_path / "new"
    assert b"152/152 bytes" in on_a_terminal("import", root, source, "--step", 1)
    assert b"24/24 bytes" in on_a_terminal("export", root, 1, tmp_path / "out.pt", "--to", "torch")
    assert on_a_terminal("export", root, 1, tmp_path / "again.pt", "--to", "torch", "--json") == b""
