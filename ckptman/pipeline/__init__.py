"""Fifth floor: the bytes on their way. Save: stage → write. Restore: read → place."""
