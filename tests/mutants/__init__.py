"""Mutation testing: puts small faults into the core modules, one at a time, and reports which ones the tests catch.

`python -m tests.mutants` runs it. `mutations` makes the faults, `__main__` runs the tests, `recorder` is the pytest
plugin of these runs, `equivalent.toml` lists faults that no test can detect.
"""
