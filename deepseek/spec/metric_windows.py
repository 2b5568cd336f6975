"""Windows over which Prometheus computes rates (PromQL duration to seconds), and the bounds of a histogram."""

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
"""Window of the autoscaler's metrics."""
QUEUES = "2m"
"""Window of queue and batch metrics: at least four scrapes, even at the slowest scrape interval."""
BUDGETS = tuple(name for name, seconds in WINDOWS_S.items() if seconds >= 300)
"""Windows of the error budgets' burn rates."""
OPENAI_BOUNDS_S = (
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Bounds of the latency histogram of the OpenAI routes, whose process does not know the SLO."""
