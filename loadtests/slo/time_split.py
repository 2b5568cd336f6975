"""Splits the time of a mean request: Triton's statistics compared with the latency that the client saw.

Time that Triton does not report belongs to the client and the network.
"""

import math
from dataclasses import dataclass
from typing import Any

from loadtests.percentiles import ms
from loadtests.results.run import Run

SPLIT = ("queue", "compute_input", "compute_infer", "compute_output")  # the parts of a request's time in Triton


def means_ms(statistics: dict[str, Any]) -> dict[str, float]:
    """Mean milliseconds of a request in each part of SPLIT; empty without statistics or requests."""
    if not statistics or not statistics["success"]["count"]:
        return {}
    return {name: statistics[name]["ns"] / max(1, statistics[name]["count"]) / 1e6 for name in SPLIT}


def mean_batch(statistics: dict[str, Any]) -> float:
    return statistics["inference_count"] / max(1, statistics["execution_count"])


def padding_share(statistics: dict[str, Any]) -> float | None:
    """Tokens that ran for texts with padding, over those without; None if unknown."""
    tokens = statistics.get("text_tokens")
    return statistics["text_padded_tokens"] / tokens if tokens else None


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """Where a mean request spent its time, in milliseconds."""

    parts: dict[str, float]
    """The parts of SPLIT."""
    outside: float
    """The rest of the client's latency: client, network, HTTP or gRPC."""
    late: float = 0.0
    """Open loop: delay between the planned and the actual send."""

    @classmethod
    def of(cls, statistics: dict[str, Any], *, service_ms: float, intended_ms: float = math.nan) -> "TimeSplit | None":
        """Splits the client's mean latency with the difference of two `fetch`es; None if either is unknown."""
        count = (statistics or {}).get("success", {}).get("count", 0)
        if not count or not math.isfinite(service_ms):
            return None
        parts = {name: statistics[name]["ns"] / count / 1e6 for name in SPLIT}
        late = intended_ms - service_ms if math.isfinite(intended_ms) else 0.0
        return cls(parts=parts, outside=max(0.0, service_ms - sum(parts.values())), late=max(0.0, late))

    @classmethod
    def of_run(cls, run: Run) -> "TimeSplit | None":
        service, intended = run.window.latency("service").mean_ms, run.window.latency("intended").mean_ms
        return cls.of(run.server.get("statistics") or {}, service_ms=service, intended_ms=intended)

    @property
    def total(self) -> float:
        """Milliseconds from the actual send to the answer."""
        return sum(self.parts.values()) + self.outside

    @property
    def named(self) -> dict[str, float]:
        return {
            "in the model": self.parts["compute_infer"],
            "in Triton's queue": self.parts["queue"],
            "handing tensors over": self.parts["compute_input"] + self.parts["compute_output"],
            "in client, network and Triton's front end": self.outside,
        }

    @property
    def account(self) -> str:
        told = [f"{ms(value)} {where}" for where, value in self.named.items()]
        late = f"; it was sent {ms(self.late)} after its planned time" if self.late > 0.1 * self.total else ""
        return f"A mean request took {ms(self.total)}: {', '.join(told[:-1])} and {told[-1]}{late}."

    @property
    def sentence(self) -> str:
        """The account, and advice on how to shorten its largest part."""
        largest = max(self.named, key=lambda where: self.named[where])
        share = self.named[largest] / self.total if self.total else 0.0
        return f"{self.account} The largest part, {share:.0%}, is {largest}: {SHORTENED[largest]}."


SHORTENED = {
    "in the model": "a lower precision, pruning or more threads shorten it (make tune)",
    "in Triton's queue": "a lower rate, more instances or larger batches shorten it (make tune, make capacity)",
    "handing tensors over": "smaller outputs or a larger batch shorten it",
    "in client, network and Triton's front end": "make profile shows where; often the client is busy or far away",
}
