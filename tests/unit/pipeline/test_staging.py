"""From live tensors to the bytes of a file: any shape, any cut, any order, any budget, the same bytes."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ckptman import CheckpointManager, Limits, SaveFailed
from ckptman.errors import StorageError
from ckptman.events import SaveErred, Staged
from ckptman.pipeline.arena import SLOT_NBYTES, pages
from ckptman.pipeline.planning import Part, Planner, Run
from ckptman.state.capture import Leaf
from ckptman.storage.base import NewFile
from ckptman.storage.memory import MemoryStorage

MIB = 1 << 20


def awkward() -> dict[str, torch.Tensor]:
    """Tensors of all sorts, several slots long together, cut by slot borders at odd places."""
    torch.manual_seed(0)
    return {
        "large": torch.randn(5 * MIB + 3),
        "rows": torch.randn(1000, 4099).t(),  # not row-major, and cut
        "images": torch.randn(16, 3, 64, 64).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(9 * MIB + 1).to(torch.bfloat16),
        "bytes": torch.randint(0, 255, (SLOT_NBYTES + 7,), dtype=torch.uint8),
        "conjugate": torch.randn(1001, dtype=torch.complex64).conj(),
        "nothing": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        **{f"small.{index}": torch.randn(index % 7 + 1) for index in range(500)},
    }


def saved_and_restored(root: Path | MemoryStorage, limits: Limits, **save: Any) -> None:
    state = awkward()
    with CheckpointManager(root, {"all": dict(state)}, limits=limits) as manager:
        manager.save(1, **save).result(60)
    blank = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with CheckpointManager(root, {"all": blank}) as manager:
        assert manager.restore() is not None
    for name, tensor in state.items():
        assert torch.equal(blank[name], tensor), name


@pytest.mark.parametrize(
    ("slots", "save"),
    [(1, {}), (2, {}), (3, {}), (100, {}), (1, {"block": True}), (100, {"block": True})],
    ids=["ring-1", "ring-2", "ring-3", "whole", "block-1", "block"],
)
def test_any_state_through_any_budget(tmp_path: Path, slots: int, save: dict[str, Any]) -> None:
    """The bytes are right whether all is staged, or one slot goes round; and safetensors itself reads the file."""
    saved_and_restored(tmp_path, Limits(host_nbytes=slots * SLOT_NBYTES), **save)
    loaded = safetensors.torch.load_file(next(tmp_path.glob("step-*/all.safetensors")))
    assert torch.equal(loaded["rows"], awkward()["rows"])


def test_a_plan_serves_only_a_state_that_agrees() -> None:
    """The same names, types and shapes give the same plan object; any difference another one."""
    planner = Planner()
    leaves = [Leaf(name="m/a", tensor=torch.zeros(3)), Leaf(name="m/b", tensor=torch.zeros(2, 2))]
    plan = planner.plan("m", leaves)
    assert planner.plan("m", [Leaf(name=leaf.name, tensor=leaf.tensor.clone()) for leaf in leaves]) is plan
    others = [
        [Leaf(name="m/a", tensor=torch.zeros(4)), leaves[1]],
        [Leaf(name="m/a", tensor=torch.zeros(3, dtype=torch.int32)), leaves[1]],
        [Leaf(name="m/c", tensor=torch.zeros(3)), leaves[1]],
        leaves[::-1],
        leaves[:1],
    ]
    for other in others:
        assert planner.plan("m", other) is not plan


def test_segments_hold_every_byte_of_a_file_once() -> None:
    """Pieces and header tile the file, in order, and no segment is longer than a slot."""
    tensors = awkward()
    leaves = [Leaf(name=f"all/{name}", tensor=tensor.resolve_conj()) for name, tensor in tensors.items()]
    plan = Planner().plan("all", leaves)
    position, covered = 0, 0
    for segment in plan.segments:
        assert segment.nbytes <= SLOT_NBYTES
        covered += len(segment.header)
        for piece in segment.pieces:
            nbytes = piece.nbytes if isinstance(piece, Run) else piece.stop - piece.start
            first = plan.layout.tensors[piece.first if isinstance(piece, Run) else piece.index]
            offset = piece.start if isinstance(piece, Part) else 0
            assert nbytes == 0 or position + piece.at == first.start + offset
            covered += nbytes
        position += segment.nbytes
    assert position == covered == plan.layout.nbytes
    assert len(plan.segments) > 3


def test_a_state_beyond_the_budget_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two saves through a ring of one slot: one warning, and the stall is the time of the whole staging."""
    events: list[object] = []
    state = {"x": torch.randn(20 * MIB)}
    with CheckpointManager(
        tmp_path, state, limits=Limits(host_nbytes=SLOT_NBYTES, prefault=False), hooks=[events.append]
    ) as manager:
        for step in (1, 2):
            state["x"].add_(1)
            assert manager.save(step).result(60).step == step
    assert caplog.text.count("Limits.host_nbytes") == 1
    assert len([event for event in events if isinstance(event, Staged)]) == 2


class Breaking(MemoryStorage):
    """Fails the write number *at*; None never."""

    def __init__(self) -> None:
        super().__init__("breaking")
        self.at: int | None = None
        self.writes = 0

    def open_new(self, key: str) -> NewFile:
        out = super().open_new(key)
        write = out.write

        def counted(data: Any) -> None:
            self.writes += 1
            if self.writes == self.at:
                raise StorageError("the disk is full", key=key)
            write(data)

        out.write = counted  # type: ignore[method-assign]
        return out


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 100])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_write_error_in_the_middle_leaves_everything_usable(at: int, slots: int, block: bool) -> None:
    """SaveFailed, nothing is listed, no slot is lost, and the next save works."""
    storage = Breaking()
    state = {"x": torch.randn(10 * MIB)}
    with CheckpointManager(storage, state, limits=Limits(host_nbytes=slots * SLOT_NBYTES)) as manager:
        storage.at = at
        with pytest.raises(SaveFailed, match="disk is full"):
            manager.save(1, block=block).result(60)
        assert manager.latest() is None
        storage.at = None
        for step in (2, 3):
            state["x"].add_(1)
            manager.save(step).result(60)
        saved = state["x"].clone()
        state["x"].zero_()
        assert manager.restore() is not None
        assert torch.equal(state["x"], saved)


@pytest.mark.parametrize("slots", [1, 100], ids=["ring", "whole"])
def test_ctrl_c_while_staging_commits_nothing(tmp_path: Path, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt out of a copy: nothing is committed, the next save works, no thread stays behind."""
    from ckptman.pipeline import staging

    state = {"x": torch.randn(10 * MIB)}
    before = {thread.name for thread in threading.enumerate()}
    erred: list[SaveErred] = []
    watch = lambda event: erred.append(event) if isinstance(event, SaveErred) else None
    limits = Limits(host_nbytes=slots * SLOT_NBYTES)
    with CheckpointManager(tmp_path, state, limits=limits, hooks=[watch]) as manager:
        manager.save(1).result(60)
        state["x"].add_(1)
        copies = 0
        copy = staging._copy_part

        def interrupted(*arguments: Any) -> None:
            nonlocal copies
            copies += 1
            if copies == 2:
                raise KeyboardInterrupt
            copy(*arguments)

        monkeypatch.setattr(staging, "_copy_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.save(2)
        monkeypatch.undo()
        manager.wait()
        assert [c.step for c in manager.checkpoints()] == [1]
        if slots == 1:  # then it was being written meanwhile, and whoever watches is told why that ended
            assert [str(event.error) for event in erred] == [
                "saving step 2 failed, nothing was committed: staging stopped: KeyboardInterrupt()"
            ]
        assert manager.save(3).result(60).step == 3
    assert {thread.name for thread in threading.enumerate()} <= before


class Held(MemoryStorage):
    """Holds writing back until it is let go."""

    def __init__(self) -> None:
        super().__init__("held")
        self.go = threading.Event()

    def open_new(self, key: str) -> NewFile:
        assert self.go.wait(30)
        return super().open_new(key)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_as_many_saves_are_in_flight_as_allowed(in_flight: int) -> None:
    """The one that is too many waits, and its wait is in its stall; all are committed in order, with their values."""
    storage = Held()
    state = {"x": torch.zeros(4)}
    with CheckpointManager(storage, state, limits=Limits(in_flight=in_flight)) as manager:
        pending = []
        for step in range(in_flight):
            state["x"].fill_(step)
            pending.append(manager.save(step))
        assert not any(one.done() for one in pending)
        threading.Timer(0.2, storage.go.set).start()
        state["x"].fill_(9)
        last = manager.save(9)
        assert last.stall_s > 0.1
        manager.wait()
        assert [c.step for c in manager.checkpoints()] == [*range(in_flight), 9]
        for step in (*range(in_flight), 9):
            manager.restore(step)
            assert state["x"].tolist() == [step] * 4


def test_memory_is_taken_ahead_and_not_for_blocking_saves(tmp_path: Path) -> None:
    """With prefault the arena holds the state before the first save; blocking saves give all but a few slots back."""
    model = torch.nn.Linear(4096, 2048)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with CheckpointManager(tmp_path, state, limits=Limits(host_nbytes=1 << 30)) as manager:
        assert _held_ahead(manager) == 3 + 5 + 1  # of 32 MiB and a bit, twice as much, and the random streams
        manager.save(1, block=True)
        assert manager._engine._arena._held <= 3
    with CheckpointManager(tmp_path, state, limits=Limits(prefault=False)) as manager:
        assert manager._engine._arena._held == 0


def test_the_first_save_finds_all_memory_that_it_needs(tmp_path: Path) -> None:
    """Each component's file begins in a slot of its own: that many were taken ahead, however little is in the last."""
    model = torch.nn.Linear(2048, 2048)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2048)).sum().backward()
    optimizer.step()
    with CheckpointManager(tmp_path, {"model": model, "optimizer": optimizer}) as manager:
        held = _held_ahead(manager)
        manager.save(1).result()
        assert manager._engine._arena._held == held


def _held_ahead(manager: CheckpointManager) -> int:
    arena = manager._engine._arena
    while arena._prefaulting is not None and arena._prefaulting.is_alive():
        arena._prefaulting.join(30)
    return arena._held


@pytest.mark.parametrize("overlap", [False, True])
def test_a_system_that_refuses_memory_gets_a_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, overlap: bool
) -> None:
    """The budget would allow all, the system gives one slot: the save goes through it instead of waiting for ever."""
    given = 0

    def allocate(nbytes: int) -> torch.Tensor:
        nonlocal given
        if given or nbytes > SLOT_NBYTES:
            raise MemoryError
        given += 1
        return pages(nbytes)

    monkeypatch.setattr("ckptman.pipeline.engine.pages", allocate)
    model = torch.nn.Linear(2048, 4096)
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters())}
    limits = Limits(host_nbytes=1 << 30, prefault=False)
    with CheckpointManager(tmp_path, state, limits=limits, overlap=overlap) as manager:
        for step in (1, 2):
            with torch.no_grad():
                model.weight.add_(1)
            manager.save(step).result(60)
        expected = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.zero_()
        manager.restore()
    assert torch.equal(model.weight, expected)
    assert caplog.text.count("no more memory for staging") == 1


OUT_OF_MEMORY = """
import resource, sys, torch
from pathlib import Path
from ckptman import CheckpointManager, Limits
state = {"x": torch.randn(40 << 20)}
with CheckpointManager(sys.argv[1], state, limits=Limits(host_nbytes=1 << 30, prefault=False)) as manager:
    manager.save(1, block=True)  # whatever it imports and starts is there now
    used = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmSize")).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, ((used << 10) + (75 << 20),) * 2)
    state["x"].add_(1)
    manager.save(2).result(60)
    expected = state["x"][:5].clone()
    state["x"].zero_()
    assert manager.restore().step == 2
    assert torch.equal(state["x"][:5], expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")
def test_a_real_limit_on_memory_is_survived(tmp_path: Path) -> None:
    """A process that may take 75 MiB more saves 160 MiB in the background, and says that it took a smaller ring."""
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no more memory for staging" in done.stderr
