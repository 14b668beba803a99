"""
Hugging Face: the Trainer with ckptman's checkpoints, a mirror of its own ones, and a look at its directories.

    CkptmanTrainer, CkptmanSeq2SeqTrainer   the trainers of transformers, with ``root=`` and ``resume=``
    CkptmanMixin                            the same for any subclass of ``Trainer``
    CkptmanCallback, fetch                  keep what a trainer wrote that cannot be subclassed; give it back
    find_last_checkpoint                    ``get_last_checkpoint``, but never an incomplete one

This module is a door: it imports nothing until a name is asked for, so that `find_last_checkpoint` need not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptman.integrations.transformers.callback import CkptmanCallback, fetch
    from ckptman.integrations.transformers.directory import find_last_checkpoint
    from ckptman.integrations.transformers.trainer import CkptmanMixin, CkptmanSeq2SeqTrainer, CkptmanTrainer

_HOME_OF = {
    "CkptmanCallback": "callback",
    "CkptmanMixin": "trainer",
    "CkptmanSeq2SeqTrainer": "trainer",
    "CkptmanTrainer": "trainer",
    "fetch": "callback",
    "find_last_checkpoint": "directory",
}

__all__ = [
    "CkptmanCallback",
    "CkptmanMixin",
    "CkptmanSeq2SeqTrainer",
    "CkptmanTrainer",
    "fetch",
    "find_last_checkpoint",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
