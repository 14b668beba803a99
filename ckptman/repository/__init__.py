"""Third floor: what exists in a root, and who may change it. Knows storages and documents, not torch."""
