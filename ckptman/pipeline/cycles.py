"""Python's search for garbage in cycles, kept away from work that makes very many small objects at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    """
    Let the block make its objects without Python looking, again and again, whether some of them are garbage.

    It looks after every 700 new objects, and now and then at all that a process has: capturing 50,000 tensors, that is
    half of the time, and there is nothing to be found. What the block makes is looked at afterwards.

    Holds for the whole process, so the block should be short. Threads may overlap, and a process that has switched the
    search off itself keeps it off. *Not* promised: that nobody looks: another thread may leave such a block first.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
