"""Benchmarks: ratios of two sides, measured in one run. `python -m tests.bench --help` lists them."""
