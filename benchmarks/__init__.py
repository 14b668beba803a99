"""
How fast ckptman is, beside its rivals and the physical floor of the same run.

    python -m benchmarks --quick                      every question but `remote` at a small size, under five minutes
    python -m benchmarks --json results.json          the full run, two to three hours
    python -m benchmarks --only stall,durable         a part of it
    python -m benchmarks --report results.json        tables and plots into docs/understanding/

One module per question under `questions/`; `harness` runs them, `figures` judges, `report` and `plots` show.
A question is a `Question`: contestants (functions that measure themselves in a process of their own) and targets.
"""
