"""Benchmarks: ratios of two sides measured in one run. See `python -m tests.bench --help`."""
