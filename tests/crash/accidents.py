"""A tiny run, what a root lists in one line of text, and children that die."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import safetensors.torch
import torch
from s3_server import Proxy

from ckptman import CheckpointManager, CkptmanError, CommitUnknown, FormatError, keep
from ckptman.format.catalog import Entry
from ckptman.pipeline.saving import environment
from ckptman.repository.head import attempts, read_head
from ckptman.repository.keep import Keep
from ckptman.repository.repository import DamagedCheckpointWarning, Repository
from ckptman.repository.verify import verify
from ckptman.storage.base import Storage

UNREADABLE = "unreadable"


def tiny(version: int = 0) -> dict[str, Any]:
    """A state of two components, all of whose bytes say *version*."""
    state = {"weights": torch.zeros(64), "moments": {"mean": torch.zeros(16), "count": 0}}
    become(state, version)
    return state


def become(state: dict[str, Any], version: int) -> None:
    state["weights"].fill_(version)
    state["moments"]["mean"].fill_(version)
    state["moments"]["count"] = version


def is_version(state: dict[str, Any], version: int) -> bool:
    tensors = (state["weights"], state["moments"]["mean"])
    return all(bool((tensor == version).all()) for tensor in tensors) and state["moments"]["count"] == version


class Run:
    """A training run on one root."""

    def __init__(self, storage: Storage, *, rule: Keep = keep.everything, lock_timeout: float = 0) -> None:
        self.state = tiny()
        self.manager = CheckpointManager(storage, self.state, keep=rule, rng=False, lock_timeout=lock_timeout)

    def save(self, step: int, version: int) -> None:
        become(self.state, version)
        self.manager.save(step, block=True)


def listing(storage: Storage) -> str:
    """
    All checkpoints, oldest commit first, such as ``1:7#best 2:8``: step, version, tags. Every one must be intact.

    The version is read by the safetensors library, not by ours.
    """
    repository = Repository(storage)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedCheckpointWarning)
            entries = repository.entries()
    except FormatError:
        return UNREADABLE
    return " ".join(_line(repository, entry) for entry in entries)


def _line(repository: Repository, entry: Entry) -> str:
    faults = verify(repository, entry)
    assert not faults, f"step {entry.step} is listed and damaged: {faults}"
    data = repository.storage.read(f"{entry.attempt}/weights.safetensors", limit=1 << 20)
    (weights,) = safetensors.torch.load(data).values()
    assert bool((weights == weights[0]).all())
    return f"{entry.step}:{int(weights[0])}" + "".join(f"#{tag}" for tag in entry.tags)


def restores_all(storage: Storage, listed: str) -> None:
    """Restore each checkpoint of *listed* into fresh objects, and compare every byte."""
    for line in listed.split():
        step, version = line.partition("#")[0].split(":")
        run = Run(storage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedCheckpointWarning)
            run.manager.restore(int(step))
        assert is_version(run.state, int(version)), f"step {step} restored something else than version {version}"
        run.manager.close()


def garbage(storage: Storage) -> list[str]:
    """Attempts that lie there and that no record lists."""
    record = read_head(storage).record
    assert record is not None
    listed = {entry.attempt for entry in record.checkpoints}
    return [attempt for attempt in attempts(storage) if attempt not in listed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """How a child ended: its wait status, and what it had told before, line by line."""

    status: int
    told: list[str] = field(default_factory=list)

    @property
    def was_killed(self) -> bool:
        return os.WIFSIGNALED(self.status)


Tell = Callable[[str], None]


def in_child(act: Callable[[Tell], object]) -> Fate:
    """Run ``act(tell)`` in a forked child until it ends or dies. What it told reached us, whatever happens next."""
    environment()  # asks git once, in a process of its own: not in every child
    theirs, ours = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = _fork()
    if pid == 0:
        os.close(theirs)
        _live(act, lambda line: _write(ours, line))
    os.close(ours)
    with os.fdopen(theirs, "rb") as pipe:
        told = pipe.read().decode().splitlines()
    _, status = os.waitpid(pid, 0)
    fate = Fate(status=status, told=told)
    errors = [line for line in fate.told if line.startswith("error ")]
    assert not errors, "\n".join(errors).replace("\\n", "\n")
    return fate


class Child:
    """A forked child that is alive: what it tells is read line by line; it is killed at the end of the block."""

    def __init__(self, act: Callable[[Tell], object]) -> None:
        environment()
        theirs, ours = os.pipe()
        self.pid = _fork()
        if self.pid == 0:
            os.close(theirs)
            _live(act, lambda line: _write(ours, line))
        os.close(ours)
        self._pipe = os.fdopen(theirs, "rb", buffering=0)
        self._is_reaped = False

    def hear(self) -> str:
        """The next line that it tells."""
        line = self._pipe.readline().decode().rstrip("\n")
        assert not line.startswith("error "), line.replace("\\n", "\n")
        return line

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_until_stopped(self) -> bool:
        """Whether it was stopped; False if it ended."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        self._is_reaped = not os.WIFSTOPPED(status)
        return os.WIFSTOPPED(status)

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        if not self._is_reaped:
            self.send(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._is_reaped = True

    def join(self) -> list[str]:
        """Wait until it ends; return the rest of what it told."""
        rest = self._pipe.read().decode().splitlines()
        os.waitpid(self.pid, 0)
        self._is_reaped = True
        errors = [line for line in rest if line.startswith("error ")]
        assert not errors, "\n".join(errors).replace("\\n", "\n")
        return rest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._pipe.close()


def saved(storage: Storage, step: int) -> bool | None:
    """Whether a save of *step* was acknowledged; None if nobody knows."""
    manager = CheckpointManager(storage, {"w": torch.full((9,), float(step))}, keep=keep.last(2), rng=False)
    try:
        manager.save(step, block=True)
    except CommitUnknown:
        return None
    except CkptmanError as error:
        print(f"step {step}: {error}")
        return False
    else:
        return True
    finally:
        manager.close()


def steps_of(storage: Storage) -> list[int]:
    """What is listed; nothing was passed over, and the newest restores to what was saved."""
    found = torch.zeros(9)
    with warnings.catch_warnings(), CheckpointManager(storage, {"w": found}, rng=False) as manager:
        warnings.simplefilter("error")
        steps = [checkpoint.step for checkpoint in manager.checkpoints()]
        manager.restore()
    assert torch.equal(found, torch.full((9,), float(steps[-1])))
    return steps


def killed_at(proxy: Proxy, at: int, act: Callable[[Tell], object]) -> tuple[bool, int]:
    """
    Run ``act(tell)`` in a child that is killed when its request *at* reaches *proxy*, before that is passed on.

    Returns:
        Whether it told anything before, and how many requests were struck: none, if it sent fewer.
    """
    begun, victims = threading.Event(), list[int]()

    def strike() -> None:
        begun.wait()
        os.kill(victims[0], signal.SIGKILL)

    proxy.arm(at, strike=strike)
    with Child(act) as child:
        victims.append(child.pid)
        begun.set()
        has_told = bool(child.hear())
    struck = proxy.struck
    proxy.arm()
    return has_told, struck


def _fork() -> int:
    with warnings.catch_warnings():
        # Threads of other tests' libraries may be idle here; the child uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _live(act: Callable[[Tell], object], tell: Tell) -> NoReturn:
    try:
        act(tell)
    except BaseException:  # noqa: BLE001 - the child's edge: nothing may get back into pytest
        tell("error " + traceback.format_exc().replace("\n", "\\n"))
        os._exit(1)
    os._exit(0)


def _write(pipe: int, line: str) -> None:
    os.write(pipe, f"{line}\n".encode())
