"""The command line as a process: what it imports, how it asks, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_roots import unfinished

CKPTMAN = [sys.executable, "-m", "ckptman"]

WITHOUT_TORCH = {
    "help": ("--help",),
    "ls": ("ls", "{root}"),
    "latest": ("latest", "{root}"),
    "show": ("show", "{root}", "--json"),
    "verify": ("verify", "{root}"),
    "log": ("log", "{root}"),
    "tag": ("tag", "{root}", "20", "good"),
    "untag": ("untag", "{root}", "10", "first"),
    "prune": ("prune", "{root}", "--last", "1", "--yes"),
    "delete": ("delete", "{root}", "20", "--yes"),
    "gc": ("gc", "{root}", "--yes"),
    "repair": ("repair", "{root}", "--yes"),
}


@pytest.mark.parametrize("command", WITHOUT_TORCH)
def test_torch_is_never_loaded(root: Path, command: str) -> None:
    """Each of these commands does its work in a process that has no torch."""
    unfinished(root)
    program = (
        "import sys\n"
        "from ckptman.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    words = [word.format(root=root) for word in WITHOUT_TORCH[command]]
    subprocess.run([sys.executable, "-c", program, *words], check=True, stdout=subprocess.DEVNULL)


def test_without_the_extra() -> None:
    """Where click or rich is missing, one line says what to install."""
    for missing in ("click", "rich"):
        program = f"import sys; sys.modules[{missing!r}] = None; from ckptman.cli import main; main()"
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert ran.returncode == 1
        assert ran.stderr == f"error: the command line needs {missing}: pip install 'ckptman[cli]'\n"


@pytest.mark.parametrize("style", [(), ("--json",)], ids=["table", "json"])
def test_a_broken_pipe_is_quiet(made_root: Path, style: tuple[str, ...]) -> None:
    """``ckptman ls … | head -0`` complains about nothing."""
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([*CKPTMAN, "ls", str(made_root), *style], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert ran.stderr == b""
    assert ran.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("style", [(), ("--json",)], ids=["table", "json"])
def test_a_full_disk_behind_stdout_is_one_line(made_root: Path, style: tuple[str, ...]) -> None:
    """``ckptman ls … > FILE`` on a full disk says so, and exits with 1."""
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [*CKPTMAN, "ls", str(made_root), *style], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 1
    assert "the output cannot be written: No space left on device" in ran.stderr


@pytest.mark.skipif(os.name == "nt", reason="closes descriptors in a shell")
def test_closed_streams_do_not_stop_the_work(root: Path) -> None:
    """A job that starts a command without stdout and stderr gets its work done all the same."""
    for number, words in enumerate((["ls", str(root)], ["tag", str(root), "20", "good"])):
        ran = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *CKPTMAN, *words], check=False)
        assert ran.returncode == 0, number
    assert "good" in subprocess.run([*CKPTMAN, "ls", str(root)], capture_output=True, text=True, check=True).stdout


def test_a_poor_encoding_is_no_error(made_root: Path) -> None:
    """Where the terminal cannot spell a character, it is escaped."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run([*CKPTMAN, "show", str(made_root)], capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 0
    assert "4 \\xd7 2" in ran.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
@pytest.mark.parametrize(("answer", "code", "is_left"), [("y\n", 0, False), ("n\n", 1, True), ("\n", 1, True)])
def test_it_asks_on_a_terminal(root: Path, answer: str, code: int, is_left: bool) -> None:
    """The plan and the question go to stderr; only yes means yes."""
    process, terminal = asked(root)
    os.write(terminal, answer.encode())
    out, err = process.communicate()
    os.close(terminal)
    assert process.returncode == code
    assert bool(list(root.glob("step-000000000020.*"))) == is_left
    assert (b"deleted 1 checkpoint" in out) != is_left
    assert (b"error: nothing was changed" in err) == is_left


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
def test_ctrl_c_is_130(root: Path) -> None:
    """Interrupted at the question, nothing has changed, and the exit code says so."""
    process, terminal = asked(root)
    err = interrupted(process)
    os.close(terminal)
    assert process.returncode == 130
    assert err.endswith(b"error: interrupted\n")
    assert len(list(root.glob("step-*"))) == 3


@pytest.mark.parametrize(("style", "is_json"), [((), False), (("--json",), True)], ids=["table", "json"])
def test_ctrl_c_before_it_has_begun(made_root: Path, style: tuple[str, ...], is_json: bool) -> None:
    """Interrupted while modules are still imported, it ends in the same way: one line, and 130."""
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'ckptman.cli._group':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from ckptman.cli import main\n"
        "main()"
    )
    words = [sys.executable, "-c", program, "ls", str(made_root), *style]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 130
    if is_json:
        assert json.loads(ran.stderr) == {"error": "Interrupted", "message": "interrupted", "exit_code": 130}
    else:
        assert ran.stderr == "error: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
def test_json_never_asks(root: Path) -> None:
    """Even on a terminal: a program that reads the document would not see the question."""
    import pty

    ours, theirs = pty.openpty()
    words = [*CKPTMAN, "delete", str(root), "20", "--json"]
    ran = subprocess.run(words, stdin=theirs, capture_output=True, text=True, check=False, timeout=30)
    os.close(ours)
    os.close(theirs)
    assert ran.returncode == 2
    assert ran.stderr.startswith('{"error": "UsageError", "message": "nothing was changed')
    assert len(list(root.glob("step-*"))) == 3


def interrupted(process: subprocess.Popen[bytes]) -> bytes:
    """
    Press Ctrl-C until *process* ends; its stderr. Once is not always enough: a signal that comes between Python's
    last look at its flags and the system call that reads the answer is seen only after that.
    """
    while True:
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=0.5)[1]
        except subprocess.TimeoutExpired:
            continue


def asked(root: Path) -> tuple[subprocess.Popen[bytes], int]:
    """``ckptman delete`` on a terminal, once it has asked its question; and the other end of that terminal."""
    import pty

    ours, theirs = pty.openpty()
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell may have it ignored
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}; from ckptman.cli import main; main()", "delete", str(root), "20"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    assert process.stderr is not None
    seen = b""
    while b"[y/N]" not in seen:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, seen
        seen += piece
    assert seen.startswith(b"would delete from ")
    return process, ours
