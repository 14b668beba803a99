"""Warnings that point at the user's line, however deep in ckptman they arise."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep  # noqa: PTH100, PTH120 - compared with co_filename
_OWN = _PACKAGE, contextlib.contextmanager.__code__.co_filename  # the second: context managers that decorate


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Warn of *message* at the innermost line that is not ckptman's own; at this call's own where there is none."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=level if frame is not None else 2)
