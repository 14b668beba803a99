"""Benchmarks: one module per question, each with a JSON result. Run them as ``python -m benchmarks.first_look``."""
