"""
A device that is as lazy as CUDA's rules allow: what is queued on a stream runs when somebody waits for it, not before.

Whoever forgets to wait, or to make a stream wait for another one, sees old bytes every time and not once in a thousand.
It takes the place of torch's ``meta`` device: its tensors are wrappers around host tensors.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

_running = threading.RLock()


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream, self._position = stream, stream.queued

    def synchronize(self) -> None:
        self._stream.run(self._position)


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.queued = 0
        self._done = 0
        self._work: deque[Callable[[], object]] = deque()

    def queue(self, work: Callable[[], object]) -> None:
        self._work.append(work)
        self.queued += 1

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.queue(event.synchronize)

    def synchronize(self) -> None:
        self.run(self.queued)

    def run(self, position: int) -> None:
        with _running:
            while self._done < position:
                self._done += 1
                self._work.popleft()()


class LazyDevices:
    """The module of the devices, as ``torch.cuda`` is one; streams are current for a thread, as there."""

    Stream = Stream

    def __init__(self) -> None:
        self._defaults: dict[torch.device, Stream] = {}
        self._current = threading.local()

    def current_stream(self, device: torch.device) -> Stream:
        default = self._defaults.setdefault(device, Stream(device))
        current: Stream = vars(self._current).get(str(device), default)
        return current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        assert stream.device is not None
        before = self.current_stream(stream.device)
        vars(self._current)[str(stream.device)] = stream
        yield
        vars(self._current)[str(stream.device)] = before


class LazyTensor(torch.Tensor):
    """A tensor there. Views are made at once; what reads or writes elements is queued on the current stream."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> LazyTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:  # on tensors of several devices, in torch too one by one
            for into, tensor in zip(args[0], args[1], strict=True):
                into.copy_(tensor, *args[2:], **(kwargs or {}))
            return None
        bare, keywords = tree_map(_inner, (args, kwargs or {}))
        device = next(one.device for one in torch.utils._pytree.tree_leaves(args) if isinstance(one, LazyTensor))
        if func.is_view:
            return cls(func(*bare, **keywords), device)
        stream = torch.get_device_module(device).current_stream(device)
        if func is torch.ops.aten.clone.default:
            copy = torch.empty(bare[0].shape, dtype=bare[0].dtype)
            stream.queue(lambda: copy.copy_(bare[0]))
            return cls(copy, device)
        stream.queue(lambda: func(*bare, **keywords))
        if not isinstance(args[0], LazyTensor) and not (keywords.get("non_blocking") or args[2:] == (True,)):
            stream.synchronize()  # a copy to the host that waits for its end
        return args[0]


def _inner(value: object) -> object:
    return value.inner if isinstance(value, LazyTensor) else value
