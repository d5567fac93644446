"""The benchmark: every scenario measures casfs side by side with what it is compared to, in one run.

`python -m tools.bench --help` says how to run it; `tools.bench.scenarios` lists
what there is to measure. Nothing here is imported by casfs or its store.
"""
