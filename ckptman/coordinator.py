"""How the ranks of a job talk to each other: what the rest of ckptman needs of `ckptman.coordination`."""

from __future__ import annotations

from ckptman.coordination import Coordinator, RankLost, Solo, current

__all__ = ["Coordinator", "RankLost", "Solo", "current"]
