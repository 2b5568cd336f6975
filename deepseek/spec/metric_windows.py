"""Windows over which Prometheus computes rates: PromQL duration to seconds."""

from __future__ import annotations

WINDOWS_S = {
    "1m": 60,
    "2m": 120,
    "5m": 300,
    "30m": 1800,
    "1h": 3600,
    "2h": 7200,
    "6h": 21_600,
    "1d": 86_400,
    "3d": 259_200,
}
SCALING = "1m"
"""Window of the autoscaler's metrics; `kubernetes/components/monitoring` has the same."""
QUEUES = "2m"
"""Window of queue and batch metrics: at least four scrapes, even at the slowest scrape interval."""
BUDGETS = tuple(name for name, seconds in WINDOWS_S.items() if seconds >= 300)
"""Windows of the error budgets' burn rates."""
