"""Benchmarks: ratios of two sides, measured in one run. `make help-bench` lists them."""
