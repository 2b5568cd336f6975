"""Searches for better serving settings on this machine: measured batches rank them, pairs of runs decide.

Enter: `deepseek tune` (`tune.py`). Imports: `loadtests.load`, `loadtests.slo`, `loadtests.search`; the command also
`loadtests.report`.
"""
