"""HDR histograms for latencies: whole microseconds, 3 significant digits, 1 us to 1 h.

A percentile from a histogram is at most 0.1 % above the true one. Histograms are added, never averaged.
"""

from typing import Literal

import numpy as np
from hdrh.histogram import HdrHistogram

LONGEST_US = 3_600_000_000  # an hour, the longest time-out of a request (LoadSettings.timeout_s)
Latency = Literal["intended", "service", "lag"]
KINDS: tuple[Latency, ...] = ("intended", "service", "lag")


def histogram() -> HdrHistogram:
    return HdrHistogram(1, LONGEST_US, 3)


def _highest_values() -> np.ndarray:
    """The largest value in microseconds that each count of a histogram represents."""
    layout = histogram()
    index = np.arange(layout.counts_len)
    bucket = (index >> layout.sub_bucket_half_count_magnitude) - 1
    sub_bucket = (index & (layout.sub_bucket_half_count - 1)) + layout.sub_bucket_half_count
    sub_bucket = np.where(bucket < 0, sub_bucket - layout.sub_bucket_half_count, sub_bucket)
    bucket = np.maximum(bucket, 0)
    return ((sub_bucket + 1) << bucket) - 1


VALUES_US = _highest_values()
