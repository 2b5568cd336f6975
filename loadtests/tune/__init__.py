"""Searches for better serving settings on this machine: measures candidates and confirms the best one.

Enter: `deepseek tune` (`tune.py`). Imports: `loadtests.load`, `loadtests.slo`, `loadtests.search`; the command also
`loadtests.report`.
"""
