"""What ``ckptman demo`` runs: an ordinary training script, and the accident that happens to it."""
