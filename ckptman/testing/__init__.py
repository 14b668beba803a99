"""
What ckptman is tested with, for those who write a storage or embed ckptman themselves.

- `ckptman.testing.contracts`: what every storage must do, as tests to inherit (needs pytest).
- `ckptman.testing.faults`: a system that fails, tears writes, or dies at the k-th call.
- `ckptman.testing.journal` and `ckptman.testing.power_loss`: every disk that a power loss could have left.
- `ckptman.testing.nfs`: a client that remembers what was missing, for roots on NFS.
"""
