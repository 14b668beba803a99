"""Frameworks speak of files; a root has steps and tags. What a framework calls a file has a tag here."""

from __future__ import annotations

import hashlib
import re

from ckptman.format.names import check_tag
from ckptman.manager import CheckpointManager
from ckptman.repository.keep import Keep

_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")

named = Keep(lambda history: frozenset(one.step for one in history if one.tags))
"""Keep what has a name. A name that moved to a newer checkpoint thus lets the older one go, in the same commit."""


def tag_of(name: str) -> str:
    """The tag for a file called *name*: itself where that can be a tag, else a likeness and a digest of it."""
    try:
        return check_tag(name)
    except ValueError:
        likeness = _UNFIT.sub("-", name).strip("-._")[:50]
        return f"{likeness or 'file'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def drop(manager: CheckpointManager, tag: str) -> None:
    """
    Take the name *tag* away, and delete the checkpoint that had it unless it has other names. Waits first for what is
    under way, and deletes nothing if that failed.

    Raises:
        SaveFailed, Fenced, CommitUnknown: A save failed; nothing was deleted.
    """
    manager.wait()
    for checkpoint in manager.checkpoints():
        if checkpoint.tags == (tag,):
            manager.delete(checkpoint.step)
        elif tag in checkpoint.tags:
            manager.untag(checkpoint.step, tag)
