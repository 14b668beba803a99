"""Copies from devices: after what was queued, before what comes, and never read before they have arrived."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import safetensors.torch
import torch
from lazy_device import LazyDevices, LazyTensor, Stream

from ckptman.pipeline import arena as arenas
from ckptman.pipeline import devices
from ckptman.pipeline.arena import SLOT_NBYTES, Arena, pinned
from ckptman.pipeline.overlap import Overlap, addresses
from ckptman.pipeline.planning import Planner
from ckptman.pipeline.staging import Staging
from ckptman.pipeline.stream import Stream as Slots
from ckptman.pipeline.writing import write_files
from ckptman.state.capture import Captured, Leaf
from ckptman.storage.memory import MemoryStorage

_numbers = count()


class Training:
    """Tensors on lazy devices, and the stream on which the thread that trains queues its work: not the default one."""

    def __init__(self, module: LazyDevices, count: int) -> None:
        self.devices = [torch.device("meta", next(_numbers)) for _ in range(count)]  # with no streams of earlier tests
        self.streams = [Stream(device) for device in self.devices]
        self._module = module
        torch.manual_seed(0)
        self.live: dict[str, LazyTensor] = {}
        for number, device in enumerate(self.devices):
            for name, tensor in {
                "large": torch.randn(5 << 20),  # over a slot
                "small": torch.randn(3, 5),
                "turned": torch.randn(7, 3).t(),
                "rows": torch.randn(2100, 2200).t(),  # cut, and not row-major
                "half": torch.randn(31).half(),
            }.items():
                self.live[f"{name}{number}"] = LazyTensor(tensor, device)

    def queue(self, change: Callable[[torch.Tensor], object], *, only: str = "") -> None:
        for stream in self.streams:
            with self._module.stream(stream):
                for name, tensor in self.live.items():
                    if tensor.device == stream.device and only in name:
                        change(tensor)

    def happen(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    def values(self) -> dict[str, torch.Tensor]:
        return {name: tensor.inner.clone() for name, tensor in self.live.items()}

    def staging(self, arena: Arena, **settings: Any) -> Staging:
        """Made while the training streams are current, as it is within ``save``."""
        leaves = [Leaf(name=f"m/{name}", tensor=tensor) for name, tensor in self.live.items()]
        leaves.append(Leaf(name="m/host", tensor=torch.arange(10)))
        captured = {"m": Captured(kind="module", leaves=tuple(leaves), values=b"{}", aliases={})}
        if len(self.streams) == 1:
            with self._module.stream(self.streams[0]):
                return Staging(arena, Planner(), captured, **settings)
        with self._module.stream(self.streams[0]), self._module.stream(self.streams[1]):
            return Staging(arena, Planner(), captured, **settings)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> LazyDevices:
    made = LazyDevices()
    monkeypatch.setattr(torch, "meta", made, raising=False)
    return made


def written(staging: Staging, slots: Slots, arena: Arena) -> dict[str, torch.Tensor]:
    storage = MemoryStorage(f"devices-{next(_numbers)}")
    files, _ = write_files(storage, "step-1-e1-00000000", staging.files, iter(slots), arena)
    data = bytearray(files[0].nbytes)
    storage.read_into(files[0].path, 0, memoryview(data))
    loaded = safetensors.torch.load(bytes(data))
    assert torch.equal(loaded.pop("host"), torch.arange(10))
    return loaded


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("how_many", [1, 2])
def test_a_save_has_what_was_queued_before_it_and_nothing_after(module: LazyDevices, how_many: int) -> None:
    """A kernel still runs when save is called, the update after save runs at once: the bytes are those between."""
    training, arena = Training(module, how_many), Arena()
    training.queue(lambda tensor: tensor.mul_(2))
    expected = {name: values * 2 for name, values in training.values().items()}
    staging, slots = training.staging(arena), Slots(arena)
    staging.run(slots)
    training.queue(lambda tensor: tensor.add_(1))
    training.happen()
    assert same(written(staging, slots, arena), expected)
    assert not same(training.values(), expected)
    assert arena.in_use() == 0


def test_a_ring_is_filled_by_another_thread_and_no_slot_is_taken_before_its_time(module: LazyDevices) -> None:
    """As block=True does: that thread's own current stream is ordered behind nothing, and slots go round."""
    training, arena = Training(module, 1), Arena(2 * SLOT_NBYTES)
    training.queue(lambda tensor: tensor.mul_(2))
    expected = {name: values * 2 for name, values in training.values().items()}
    staging, slots = training.staging(arena, slots=2), Slots(arena)
    beside = threading.Thread(target=staging.run, args=(slots,))
    beside.start()
    loaded = written(staging, slots, arena)
    beside.join(30)
    assert same(loaded, expected)
    assert all(not slot.arrivals for slot in arena._free)


def test_what_is_left_is_copied_while_training_goes_on(module: LazyDevices) -> None:
    """As overlap=True does: what is not left may change at once, what is left once it is copied, by another thread."""
    training, arena = Training(module, 1), Arena()
    training.queue(lambda tensor: tensor.mul_(2))
    expected = {name: values * 2 for name, values in training.values().items()}
    left = {id(tensor) for name, tensor in training.live.items() if "small" not in name}
    staging, slots = training.staging(arena), Slots(arena)
    taken = staging.run_partly(lambda tensor: id(tensor) not in left)
    training.queue(lambda tensor: tensor.add_(1), only="small")
    training.happen()
    beside = threading.Thread(target=staging.finish, args=(taken, lambda tensor: id(tensor) in left))
    beside.start()
    beside.join(30)
    training.queue(lambda tensor: tensor.add_(1))
    training.happen()
    for slot in taken:
        slots.put(slot)
    slots.end()
    assert same(written(staging, slots, arena), expected)


def test_what_is_left_does_not_make_save_wait_for_the_device(module: LazyDevices) -> None:
    """Nothing is copied at once: the kernel that was queued has not run when save returns, nor has any copy."""
    training, arena = Training(module, 1), Arena()
    training.queue(lambda tensor: tensor.mul_(2))
    before = training.values()
    training.staging(arena).run_partly(lambda tensor: tensor.is_cpu)
    assert same(training.values(), before)


def test_a_slot_that_is_given_back_receives_nothing_any_more(module: LazyDevices) -> None:
    """Whoever takes it next may write into it: a save that failed leaves no copy on its way."""
    training, arena = Training(module, 1), Arena()
    slots = Slots(arena)
    slots.close()
    training.staging(arena).run(slots)
    for slot in arena._free:
        slot.tensor.zero_()
    training.happen()
    side: Any = devices._side_stream(training.devices[0])
    side.synchronize()
    assert not any(slot.tensor.any() for slot in arena._free)


def test_devices_without_streams_are_copied_from_at_once(module: LazyDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MPS is: nothing is queued that nobody would wait for."""
    training, arena = Training(module, 1), Arena()
    monkeypatch.setattr(devices, "_has_streams", lambda device: False)
    expected = training.values()
    staging, slots = training.staging(arena), Slots(arena)
    staging.run(slots)
    assert not any(slot.arrivals for slot in slots._slots)
    training.live["small0"].inner.add_(1)
    assert same(written(staging, slots, arena), expected)


def test_where_no_memory_can_be_locked_ordinary_memory_serves(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch refuses to lock memory (there is no accelerator here): slots all the same, and one warning."""

    def refused(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refused)
    arenas._say_that_none_is_locked.cache_clear()
    arena = Arena(3 * SLOT_NBYTES, allocate=pinned, at_once=1)
    with caplog.at_level(logging.WARNING):
        assert arena.reserve(3)
    assert [record.message for record in caplog.records if "page-locked" in record.message] == [caplog.messages[0]]
    arenas._say_that_none_is_locked.cache_clear()


def test_locked_memory_is_taken_slot_by_slot() -> None:
    """torch rounds an allocation of locked memory up to a power of two: more than the budget, unless it is a slot."""
    asked: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        return arenas.pages(nbytes)

    arena = Arena(3 * SLOT_NBYTES, allocate=allocate, at_once=1)
    assert arena.reserve(3)
    assert asked == [SLOT_NBYTES] * 3


def test_what_a_capturable_optimizer_owns_is_not_left() -> None:
    """A replayed CUDA graph steps without a hook and without a counter that moves."""
    weight = torch.nn.Parameter(torch.ones(3))
    captured = {"m": Captured(kind="module", leaves=(Leaf(name="m/w", tensor=weight),), values=b"{}", aliases={})}
    for capturable in (False, True):
        optimizer = torch.optim.AdamW([weight], capturable=capturable)
        overlap = Overlap()
        assert bool(overlap.leave(captured, {"o": optimizer}, addresses([optimizer]))) is not capturable
        overlap.close()
