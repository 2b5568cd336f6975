"""Replays a day of traffic on a simulated cluster, to choose the autoscaler's settings.

Enter: `deepseek simulate-scale` (`simulate_scale.py`). Imports: `loadtests.search` (capacity.json), `loadtests.slo`.
"""
