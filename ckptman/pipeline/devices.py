"""
Copies from devices (CUDA, XPU, any that torch runs on streams), beside the work that training has queued there.

1. On the thread that calls ``save``, each device's side stream is made to wait for what that thread's current stream
   has queued so far. So a copy sees the results of kernels that have not run yet, whichever thread asks for it:
   torch's current streams belong to threads, and another thread's default stream is ordered behind nothing.
2. Copies go to the side stream, into page-locked slots, without the host waiting. Behind the copies of a slot an event
   is recorded. Whoever reads the slot, or gives it to others, waits for that first.
3. ``save`` returns, or with ``overlap=True`` the optimizer's step begins, once the *host* has seen the end of all
   copies from what may then change. So later writes on any stream, by the host, and reuse of freed memory by the
   allocator are safe, without a word to either: the live tensors are referred to until then.
4. *Not* ordered: what other streams had queued before ``save``, where the current stream does not wait for them. It is
   the same with ``tensor.cpu()``. With ``overlap=True`` an optimizer's tensor that another stream changes before the
   step is found by its version counter (overlap.py); a replayed CUDA graph moves none, so what a ``capturable``
   optimizer owns is never left to a thread.

To make the current stream wait for the copies instead of the host would not do in 3: a second optimizer that steps on a
stream of its own would not be ordered. It would gain the time of one launch, where copies take longer than the forward
and backward passes, and nothing otherwise: the device has work queued while the host waits.

Devices without streams (MPS) are copied from synchronously.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from ckptman.pipeline.arena import Slot


class _Stream(Protocol):
    def wait_event(self, event: Any) -> None: ...
    def record_event(self) -> Any: ...


class SideStreams:
    """
    The side streams of some devices, for one save.

    Args:
        tensors: What will be copied from; to be made on the thread whose queued work the copies shall see.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        devices = {tensor.device for tensor in tensors if not tensor.is_cpu}
        self.are_used = bool(devices) and all(map(_has_streams, devices))
        self._streams = [(_module(device), _side_stream(device)) for device in devices] if self.are_used else []
        for device in devices if self.are_used else ():
            _side_stream(device).wait_event(_module(device).current_stream(device).record_event())

    @contextmanager
    def copying_to(self, slot: Slot) -> Iterator[None]:
        """Queue the block's copies to *slot*; however it ends, the slot knows what is on its way to it."""
        with ExitStack() as entered:
            for module, stream in self._streams:
                entered.enter_context(module.stream(stream))
            try:
                yield
            finally:
                slot.arrivals.extend(stream.record_event() for _, stream in self._streams)

    def wait(self) -> None:
        """Wait until all that was queued is copied."""
        for event in [stream.record_event() for _, stream in self._streams]:
            event.synchronize()


def are_in_use() -> bool:
    """Whether this process has begun to use an accelerator, so that page-locked memory speeds up copies."""
    if not torch.accelerator.is_available():
        return False
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return bool(getattr(module, "is_initialized", bool)())


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _has_streams(device: torch.device) -> bool:
    return all(hasattr(_module(device), name) for name in ("Stream", "stream", "current_stream"))


@functools.cache
def _side_stream(device: torch.device) -> _Stream:
    """One for each device and process: copies of several saves queue up behind each other."""
    stream: _Stream = _module(device).Stream(device)
    return stream
