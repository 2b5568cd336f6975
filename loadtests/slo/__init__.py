"""Judges a saved run against the SLO of `deploy.toml`: the verdict and its confidence intervals.

Enter: `deepseek verdict` (`verdict.py`). Imports: `loadtests.results`.
"""
