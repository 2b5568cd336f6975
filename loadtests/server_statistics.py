"""Triton's own account of a run: the difference of its per-model statistics before and after.

Contract: `fetch` asks over the protocol of the load; a server that does not let itself be asked (a
gateway, a restricted protocol) gives None, and the run goes on without. Times are cumulated
nanoseconds beside the number of requests that they are of.

Examples:
    before = fetch("127.0.0.1:8001", "grpc", "recommender")
    difference(before, fetch("127.0.0.1:8001", "grpc", "recommender"))["queue"]    # {"count": 2000, "ns": 3100000}
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import tritonclient.grpc
import tritonclient.http

DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
SPLIT = ("queue", "compute_input", "compute_infer", "compute_output")  # what a request's time in Triton consists of
Statistics = dict[str, Counter[str]]  # version -> flat counters


def fetch(url: str, protocol: Literal["grpc", "http"], model: str) -> Statistics | None:
    """What each version has done since the server started; None where it does not say."""
    client: Any = None
    try:
        if protocol == "grpc":
            client = tritonclient.grpc.InferenceServerClient(url)
            answer = client.get_inference_statistics(model, as_json=True, client_timeout=2)
        else:
            client = tritonclient.http.InferenceServerClient(url, connection_timeout=2, network_timeout=2)
            answer = client.get_inference_statistics(model)
        return {version["version"]: _flat(version) for version in answer["model_stats"]}
    except Exception:  # refusals look different behind every gateway; none may end the run
        return None
    finally:
        if client is not None:
            client.close()


def _flat(version: dict[str, Any]) -> Counter[str]:
    """One version's counters; gRPC's JSON leaves zeros out and has int64 as strings."""
    flat = Counter({name: int(version.get(name, 0)) for name in ("inference_count", "execution_count")})
    for name in DURATIONS:
        duration = version.get("inference_stats", {}).get(name, {})
        flat[f"{name}.count"] = int(duration.get("count", 0))
        flat[f"{name}.ns"] = int(duration.get("ns", 0))
    for batch in version.get("batch_stats", ()):
        flat[f"batch.{batch['batch_size']}"] = int(batch["compute_infer"].get("count", 0))
    return flat


def difference(before: Statistics | None, after: Statistics | None) -> dict[str, Any]:
    """What happened in between, over all versions that took part; empty where it is not known."""
    if before is None or after is None:
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


def means_ms(statistics: dict[str, Any]) -> dict[str, float]:
    """Mean milliseconds of a request in each part of SPLIT; empty where no request is known of."""
    if not statistics or not statistics["success"]["count"]:
        return {}
    return {name: statistics[name]["ns"] / max(1, statistics[name]["count"]) / 1e6 for name in SPLIT}


def mean_batch(statistics: dict[str, Any]) -> float:
    """Rows that the model was given at once, on average."""
    return statistics["inference_count"] / max(1, statistics["execution_count"])
