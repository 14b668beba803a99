"""Fourth floor, torch: live objects ↔ leaves. `capture` takes a state, `restore` gives it back."""
