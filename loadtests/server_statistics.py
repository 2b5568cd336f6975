"""Triton's own account of a run: the difference of its per-model statistics before and after.

Contract: `fetch` asks over the protocol of the load; a server that does not let itself be asked (a
gateway, a restricted protocol) gives None, and the run goes on without. Times are cumulated
nanoseconds beside the number of requests that they are of. `Split` sets them beside what the client saw: what
Triton does not account for is the client's and the network's.

Examples:
    before = fetch("127.0.0.1:8001", "grpc", "recommender")
    difference(before, fetch("127.0.0.1:8001", "grpc", "recommender"))["queue"]    # {"count": 2000, "ns": 3100000}
    Split.of(statistics, service_ms=60.0).sentence    # "A mean request took 60.0 ms: 8.20 ms in the model, ..."
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import tritonclient.grpc
import tritonclient.http

from loadtests.results import Run

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


@dataclass(frozen=True, kw_only=True)
class Split:
    """Where a mean request spent its time, in milliseconds."""

    parts: dict[str, float]
    """By SPLIT; `cache` where Triton's response cache answered some."""
    outside: float
    """Of what the client saw, all that is not in `parts`: client, network, HTTP or gRPC."""
    late: float = 0.0
    """Open loop: from the planned to the actual send."""

    @classmethod
    def of(cls, statistics: dict[str, Any], *, service_ms: float, intended_ms: float = math.nan) -> Split | None:
        """From the difference of two `fetch`es and the means that the client saw; None where either is not known."""
        count = (statistics or {}).get("success", {}).get("count", 0)
        if not count or not math.isfinite(service_ms):
            return None
        # Totals over all requests: one that the cache answered has no compute time.
        parts = {name: statistics[name]["ns"] / count / 1e6 for name in SPLIT}
        if statistics.get("cache_hit", {}).get("count"):
            parts["cache"] = statistics["cache_hit"]["ns"] / count / 1e6
        late = intended_ms - service_ms if math.isfinite(intended_ms) else 0.0
        return cls(parts=parts, outside=max(0.0, service_ms - sum(parts.values())), late=max(0.0, late))

    @classmethod
    def of_run(cls, run: Run) -> Split | None:
        """Of its measured time."""
        service, intended = run.window.latency("service").mean_ms, run.window.latency("intended").mean_ms
        return cls.of(run.server.get("statistics") or {}, service_ms=service, intended_ms=intended)

    @property
    def total(self) -> float:
        """From the actual send to the answer."""
        return sum(self.parts.values()) + self.outside

    @property
    def named(self) -> dict[str, float]:
        """The parts as one speaks of them."""
        parts = {"in the model": self.parts["compute_infer"], "in Triton's queue": self.parts["queue"]}
        parts["handing tensors over"] = self.parts["compute_input"] + self.parts["compute_output"]
        if "cache" in self.parts:
            parts["in the cache"] = self.parts["cache"]
        return {**parts, "in client, network and Triton's front end": self.outside}

    @property
    def account(self) -> str:
        """The same in a sentence."""
        told = [f"{figure(value)} {where}" for where, value in self.named.items()]
        late = f"; it left {figure(self.late)} after its planned time" if self.late > 0.1 * self.total else ""
        return f"A mean request took {figure(self.total)}: {', '.join(told[:-1])} and {told[-1]}{late}."

    @property
    def sentence(self) -> str:
        """The account, and what shortens its largest part."""
        largest = max(self.named, key=lambda where: self.named[where])
        share = self.named[largest] / self.total if self.total else 0.0
        return f"{self.account} The largest part, {share:.0%}, is {largest}: {SHORTENED[largest]}."


SHORTENED = {
    "in the model": "a lower precision, pruning or more threads shorten it (make tune)",
    "in Triton's queue": "a lower rate, more instances or larger batches shorten it (make tune, make capacity)",
    "handing tensors over": "smaller outputs or a larger batch shorten it",
    "in the cache": "it is what the cache itself costs",
    "in client, network and Triton's front end": "make profile shows where; a busy or distant client is usual",
}


def figure(value_ms: float) -> str:
    """Milliseconds with three figures."""
    return f"{value_ms:.2f} ms" if value_ms < 10 else f"{value_ms:.1f} ms" if value_ms < 100 else f"{value_ms:.0f} ms"
