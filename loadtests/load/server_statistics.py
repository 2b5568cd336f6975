"""Triton's statistics of a run: the difference of its per-model counters before and after.

Contract: a server that refuses (a gateway, a restricted protocol) gives None, and the run has no statistics. Times are
total nanoseconds with the number of requests:
`difference(before, fetch(url, "grpc", "recommender"))["queue"]` is `{"count": 2000, "ns": 3100000}`.
"""

from collections import Counter
from typing import Any, Literal

from deepseek_client import InferenceClient, InferenceError

DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
Statistics = dict[str, Counter[str]]  # version -> flat counters


def fetch(url: str, protocol: Literal["grpc", "http"], model: str) -> Statistics | None:
    """The counters of each version since the server started; None if the server refuses."""
    try:
        with InferenceClient(url, protocol, timeout_s=2, retries=0) as client:
            answer = client.model_statistics(model)
        return {version["version"]: _flat(version) for version in answer["model_stats"]}
    except (InferenceError, AttributeError, LookupError, TypeError, ValueError):  # refused, or not as Triton answers
        return None


def _flat(version: dict[str, Any]) -> Counter[str]:
    """One version's counters; gRPC's JSON omits zeros and has int64 as strings."""
    flat = Counter({name: int(version.get(name, 0)) for name in ("inference_count", "execution_count")})
    for name in DURATIONS:
        duration = version.get("inference_stats", {}).get(name, {})
        flat[f"{name}.count"] = int(duration.get("count", 0))
        flat[f"{name}.ns"] = int(duration.get("ns", 0))
    for batch in version.get("batch_stats", ()):
        flat[f"batch.{batch['batch_size']}"] = int(batch["compute_infer"].get("count", 0))
    return flat


def difference(before: Statistics | None, after: Statistics | None) -> dict[str, Any]:
    """The counts between the two, over all versions that took part; empty if either is None, or if a counter fell
    because the server was restarted."""
    if before is None or after is None or any(not before[each] <= after[each] for each in before.keys() & after.keys()):
        return {}
    by_version = {version: after[version] - before.get(version, Counter()) for version in after}
    total = sum(by_version.values(), Counter())
    return {
        "versions": [version for version, counts in by_version.items() if counts],
        "inference_count": total["inference_count"],
        "execution_count": total["execution_count"],
        "batches": {key.removeprefix("batch."): total[key] for key in sorted(total) if key.startswith("batch.")},
        **{name: {"count": total[f"{name}.count"], "ns": total[f"{name}.ns"]} for name in DURATIONS},
    }
