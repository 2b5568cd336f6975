"""Searches for the highest rate that meets the SLO, with trials on a running server: the capacity of a model.

Enter: `deepseek capacity` (`capacity.py`). Imports: `loadtests.load`, `loadtests.slo`; the command also
`loadtests.report`.
"""
