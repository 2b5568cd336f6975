"""Formats figures for people, and which percentiles tables show."""

import math

SUMMARY = (50, 95, 99, 99.9)
"""Percentiles of a summary."""
ALL = (50, 75, 90, 95, 99, 99.9, 99.99)
"""Percentiles of a full table."""


def ms(value: float | None) -> str:
    """Milliseconds with three figures; "never" for infinity or None, "-" for nan."""
    if value is None or math.isinf(value):
        return "never"
    if math.isnan(value):
        return "-"
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"
