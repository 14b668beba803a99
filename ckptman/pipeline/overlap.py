"""
Overlap: staging hidden behind the forward and backward passes of the next step.

What an optimizer owns (parameters, moments) cannot change before its ``step()``, so a thread copies it after ``save``
has returned, and a hook before every step waits for that thread. Everything else is copied before ``save`` returns.
An optimizer that is no part of the state waits too where it owns the same memory: a fused one changes it without a
move of any version counter.

Why no torn copy is ever committed:

1. ``save`` notes the version counter of every tensor that is left to the thread.
2. The thread copies. Training computes gradients meanwhile; those are no part of the state.
3. Something changes a tensor all the same: weight clipping, ``load_state_dict``. Its version counter moves, though
   perhaps only after the change, while the copy is made in the middle of it.
4. So the counters are compared *on the thread that called save*, when it comes by again (at the next step, save, or
   question about the save): between two of its operations nothing is half done. Until then the commit waits; the
   writing and fsyncing of the data does not.
5. A counter has moved: the save fails, nothing was committed, and from the next save on that tensor is copied at once.

Where that thread has ended, nothing of it is half done either: the commit compares for itself.

Not seen: changes that move no counter (``.data``, NumPy views, another process), if they come before the next step.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptman.errors import SaveFailed
from ckptman.pipeline.arena import Slot
from ckptman.pipeline.staging import Staging
from ckptman.pipeline.stream import Stream
from ckptman.state.capture import Captured
from ckptman.state.dtensor import is_sharded, local
from ckptman.state.tensors import are_simple, is_plain

_POLL_S = 0.1


class Deferred:
    """
    The part of one save's staging that goes on after ``save`` has returned.

    Attributes:
        waited_s: How many seconds steps and other calls were kept waiting for it.
    """

    def __init__(self, step: int, staging: Staging, slots: Sequence[Slot], stream: Stream, left: Left) -> None:
        self.waited_s = 0.0
        self._step = step
        self._staging: Staging | None = staging
        self._slots = slots
        self._stream = stream
        self._left = left
        self._trainer = threading.current_thread()
        self._is_staged = threading.Event()
        self._mutex = threading.Lock()  # guards the two below
        self._is_settled = threading.Event()
        self._moved: tuple[str, ...] = ()

    def run(self) -> None:
        """Copy what is left, and send everything to the writer; for a thread of its own."""
        staging, self._staging = self._staging, None  # the live tensors are let go with it
        assert staging is not None
        try:
            staging.finish(self._slots, self._left.has)
        except BaseException as error:  # noqa: BLE001 - a thread's edge: the writer raises it
            self._stream.fail(error)
        else:
            for slot in self._slots:
                self._stream.put(slot)
            self._stream.end()
        finally:
            self._is_staged.set()

    def settle(self, *, wait: bool = True) -> None:
        """For the thread that trains: wait until all is copied (or leave), then find out whether anything moved."""
        if not wait and not self._is_staged.is_set():
            return
        began = time.monotonic()
        self._is_staged.wait()
        self.waited_s += time.monotonic() - began
        with self._mutex:
            if not self._is_settled.is_set():
                self._moved = self._left.moved()
                self._left.forget()
                self._is_settled.set()

    def wait_for(self, optimizer: Optimizer) -> None:
        """For any thread, before *optimizer* steps: if it owns what is left, wait until that is copied."""
        if not self._left.is_owned_by(optimizer):
            return
        if threading.current_thread() is self._trainer:
            self.settle()
        else:
            self._is_staged.wait()

    def confirm(self) -> None:
        """
        For the writer, before it commits: wait for the verdict of the thread that trains.

        Raises:
            SaveFailed: A tensor was changed while it was copied.
        """
        while not self._is_settled.wait(_POLL_S):
            if not self._trainer.is_alive():
                self.settle()
        if self._moved:
            raise SaveFailed(
                f"saving step {self._step} failed, nothing was committed: {len(self._moved)} tensors were changed "
                f"after save() and before the optimizer's next step: {', '.join(self._moved[:5])}. From the next save "
                "on they are copied before save() returns. Or change weights before saving; or use overlap=False",
                step=self._step,
            )


class Left:
    """The tensors that are left to be copied later: what they are, and their version counters now."""

    def __init__(self, names: Mapping[int, str], tensors: Iterable[torch.Tensor], lively: set[str]) -> None:
        self._watched = [(tensor, tensor._version) for tensor in tensors]
        self._names = names
        self._ids = frozenset(id(tensor) for tensor, _ in self._watched)
        self._lively = lively

    def __bool__(self) -> bool:
        return bool(self._watched)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether *tensor* is one of them."""
        return id(tensor) in self._ids

    def has_not(self, tensor: torch.Tensor) -> bool:
        """Whether it is not."""
        return id(tensor) not in self._ids

    def is_owned_by(self, optimizer: Optimizer) -> bool:
        """Whether a step of *optimizer* may change one of them."""
        memory = {tensor.untyped_storage().data_ptr() for tensor, _ in self._watched}
        owned = filter(_is_dense, map(_held, _wholes(optimizer)))
        return any(tensor.untyped_storage().data_ptr() in memory for tensor in owned)

    def moved(self) -> tuple[str, ...]:
        """The names of those that were changed since; they are never left again."""
        moved = tuple(self._names[id(tensor)] for tensor, version in self._watched if tensor._version != version)
        self._lively.update(moved)
        return moved

    def forget(self) -> None:
        """Let the tensors go."""
        self._watched = []


class Overlap:
    """Knows which tensors may be copied later, and makes every step of their optimizers wait for that."""

    def __init__(self) -> None:
        self._lively: set[str] = set()
        self._under_way: list[Deferred] = []
        self._handles: dict[int, tuple[Optimizer, Any]] = {}
        self._handle_of_others: Any = None

    def leave(self, captured: Mapping[str, Captured], state: Mapping[str, object], trained: Collection[int]) -> Left:
        """
        What may be copied later; from now on the steps of its optimizers wait. For the thread that trains.

        Args:
            captured: The state, captured.
            state: The same, live.
            trained: `addresses` of all its optimizers.
        """
        optimizers = [live for live in state.values() if isinstance(live, Optimizer)]
        proven = [optimizer for optimizer in optimizers if _tells_before_it_steps(optimizer)]
        unproven = [optimizer for optimizer in optimizers if not _tells_before_it_steps(optimizer)]
        for optimizer in proven:
            if id(optimizer) not in self._handles:
                self._handles[id(optimizer)] = optimizer, optimizer.register_step_pre_hook(self._before_step)
        if self._handle_of_others is None:
            self._handle_of_others = register_optimizer_step_pre_hook(_waiting_for(weakref.ref(self)))
        owned = set(trained) - addresses(unproven)
        leaves = [
            leaf
            for part in captured.values()
            for leaf in part.leaves
            if leaf.tensor.data_ptr() in owned and leaf.name not in self._lively and not leaf.tensor.is_inference()
        ]
        return Left({id(leaf.tensor): leaf.name for leaf in leaves}, [leaf.tensor for leaf in leaves], self._lively)

    def add(self, deferred: Deferred) -> None:
        """Wait for *deferred* from now on."""
        self._under_way.append(deferred)

    def settle(self) -> None:
        """For the thread that trains: `Deferred.settle` all that is under way."""
        while self._under_way:
            self._under_way[0].settle()
            self._under_way.pop(0)

    def close(self) -> None:
        """Remove the hooks."""
        for _, handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        if self._handle_of_others is not None:
            self._handle_of_others.remove()
            self._handle_of_others = None

    def wait_before(self, optimizer: Optimizer) -> None:
        """For any thread, before a step of an optimizer of this process, which need not be of the state."""
        if id(optimizer) not in self._handles:
            for deferred in tuple(self._under_way):
                deferred.wait_for(optimizer)

    def _before_step(self, optimizer: Optimizer, arguments: object, keywords: object) -> None:
        self.settle()


def _waiting_for(overlap: weakref.ref[Overlap]) -> Callable[[Optimizer, object, object], None]:
    """A hook for all optimizers of the process that does not keep *overlap*, and with it the state, alive."""

    def before_step(optimizer: Optimizer, arguments: object, keywords: object) -> None:
        if (alive := overlap()) is not None:
            alive.wait_before(optimizer)

    return before_step


def addresses(optimizers: Iterable[Optimizer]) -> set[int]:
    """Where the tensors begin that *optimizers* own: parameters, and what their state holds."""
    tensors = [tensor for optimizer in optimizers for tensor in _wholes(optimizer)]
    if not are_simple(tensors, anchored=True):
        tensors = [one for one in map(_held, tensors) if _is_dense(one)]
    return set(map(torch.Tensor.data_ptr, tensors)) - {0}  # where an empty one would be


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return local(tensor) if is_sharded(tensor) else tensor


def _wholes(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for values in optimizer.state.values():
        if isinstance(values, dict):
            yield from [value for value in values.values() if isinstance(value, torch.Tensor)]


def _is_dense(tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and tensor.layout == torch.strided and not tensor.is_nested


def _tells_before_it_steps(optimizer: Optimizer) -> bool:
    """
    Whether every ``step()`` is known to run the hooks first: torch wraps the class's method so, and marks it.

    One that is ``capturable`` may be part of a CUDA graph, whose replay runs no hook and moves no version counter.
    """
    if any(group.get("capturable") for group in optimizer.param_groups):
        return False
    own: Callable[..., object] | None = vars(optimizer).get("step")  # schedulers put a wrapper there, also marked
    is_known = own is None or hasattr(own, "_wrapped_by_lr_sched")
    return is_known and bool(getattr(type(optimizer).step, "hooked", False))
