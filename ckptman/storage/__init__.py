"""Ground floor: bytes by key. Knows nothing of checkpoints."""
