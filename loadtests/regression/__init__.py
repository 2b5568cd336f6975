"""Tests whether a candidate is slower than a baseline: interleaved runs, judged by confidence intervals.

Enter: `deepseek regression` (`regression.py`). Imports: `loadtests.load`, `loadtests.slo`, `loadtests.search`.
"""
