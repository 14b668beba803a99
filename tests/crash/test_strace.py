"""The same as test_kill.py, seen from outside: strace kills the process at a system call, whoever makes it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from accidents import Run, Tell, garbage, in_child, listing

from ckptman import keep
from ckptman.storage.local import LocalStorage

pytestmark = pytest.mark.strace

MUTATING = ("openat", "write", "fsync", "close", "link", "linkat", "unlink", "unlinkat", "mkdir", "rmdir", "flock")
POINTS = 48


def _can_trace() -> str | None:
    """Why strace cannot be used here; None if it can."""
    if shutil.which("strace") is None:
        return "there is no strace"
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        with attached(sleeper.pid, []):
            return None
    except PermissionError as error:
        return f"strace may not attach: {error}"
    finally:
        sleeper.kill()
        sleeper.wait()


@contextmanager
def attached(pid: int, arguments: list[str]) -> Iterator[None]:
    """With strace attached to *pid*. PermissionError where that is refused."""
    command = ["strace", "-f", "-p", str(pid), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) as strace:
        assert strace.stderr is not None
        first = strace.stderr.readline()
        if "attached" not in first:
            strace.wait()
            raise PermissionError(first.strip())
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)  # it detaches
            strace.stderr.read()


@pytest.fixture(scope="module", autouse=True)
def _tracing() -> None:
    why_not = _can_trace()
    if why_not is not None:
        pytest.skip(why_not)


def save_traced(root: Path, arguments: list[str]) -> tuple[bool, list[str]]:
    """Save step 3, keeping two, in a process with strace attached; whether it was killed, and what it told."""
    go, ours = os.pipe()
    pids, tell_pid = os.pipe()

    def child(tell: Tell) -> None:
        os.write(tell_pid, f"{os.getpid()}\n".encode())
        os.read(go, 1)
        Run(LocalStorage(root), rule=keep.last(2)).save(3, 3)
        tell("ack")

    class Attach:
        """Attaches once the child's pid is known; runs in a process of its own, as in_child waits for the child."""

        def __enter__(self) -> None:
            self.pid = os.fork()
            if self.pid:
                return
            try:
                pid = int(os.read(pids, 20))
                os.close(tell_pid)
                with attached(pid, arguments):
                    os.write(ours, b"g")
                    _wait_for_end(pid)
            finally:
                os._exit(0)

        def __exit__(self, *error: object) -> None:
            os.waitpid(self.pid, 0)

    with Attach():
        fate = in_child(child)
    for descriptor in (go, ours, pids, tell_pid):
        os.close(descriptor)
    return fate.was_killed, fate.told


def _wait_for_end(pid: int) -> None:
    descriptor = os.pidfd_open(pid)
    import select

    select.select([descriptor], [], [], 30)


def test_killed_by_strace_at_any_system_call(scratch: Path) -> None:
    """Whatever system call a save dies in: the two checkpoints are there, or the new one too; the next save works."""
    template = scratch / "template"
    run = Run(LocalStorage(template))
    run.save(1, 1)
    run.save(2, 2)
    run.manager.close()

    shutil.copytree(template, scratch / "root")
    trace = scratch / "trace"
    was_killed, told = save_traced(scratch / "root", ["-o", str(trace), "-e", f"trace={','.join(MUTATING)}"])
    assert not was_killed
    assert told == ["ack"]
    shutil.rmtree(scratch / "root")
    # strace counts the calls of each thread: one after the most that a thread makes would kill nobody
    by_thread = Counter(re.findall(r"^(\d+) +(\w+)\(", trace.read_text(), re.MULTILINE))
    counts = {name: max((n for (_, called), n in by_thread.items() if called == name), default=0) for name in MUTATING}
    points = [(name, at) for name in MUTATING for at in range(1, counts[name] + 1)]
    chosen = points[:: max(1, len(points) // POINTS)]

    outcomes: Counter[str] = Counter()
    for name, at in chosen:
        root = scratch / "root"
        shutil.copytree(template, root)
        inject = ["-o", "/dev/null", "-e", f"inject={name}:signal=SIGKILL:when={at}", "-e", f"trace={name}"]
        was_killed, told = save_traced(root, inject)
        assert was_killed or told == ["ack"]
        storage = LocalStorage(root)
        found = listing(storage)
        assert found == "2:2 3:3" if told else found in ("1:1 2:2", "2:2 3:3"), (name, at)
        after = Run(storage)
        after.save(99, 99)
        after.manager.close()
        assert listing(storage) == f"{found} 99:99"
        assert garbage(storage) == []
        outcomes["killed" if was_killed else "lived"] += 1
        shutil.rmtree(root)
    print(f"{len(chosen)} of {len(points)} system calls ({counts}): {dict(outcomes)}")
    assert outcomes["killed"] >= 30
