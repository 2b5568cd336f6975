"""Plans, sends and records one load test.

Enter: `deepseek loadtest` (`loadtest.py`). Imports: `loadtests.results`, `loadtests.slo`, the client.
"""
