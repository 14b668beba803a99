"""
How the ranks of a job talk to each other.

`Torch` for a job of ``torch.distributed``, `Files` for one that shares nothing but a storage, `Solo` for one process.
"""

from ckptman.coordination.coordinator import Coordinator, RankLost, Solo, current
from ckptman.coordination.files import Files
from ckptman.coordination.torch_store import Torch

__all__ = ["Coordinator", "Files", "RankLost", "Solo", "Torch", "current"]
