"""A log of every single request of a load; load tests keep histograms instead (`recorder`)."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loadtests.load.inputs import NO_LENGTH, Length


class SentRequest(NamedTuple):
    """One request; times are seconds since the load began."""

    planned_s: float
    sent_s: float
    finished_s: float
    error: str | None
    """Kind and message; None if it was answered."""

    @property
    def latency_ms(self) -> float:
        """Latency from the planned time."""
        return (self.finished_s - self.planned_s) * 1000

    @property
    def kind(self) -> str:
        return (self.error or "").partition(":")[0]


@dataclass(frozen=True)
class RequestLog:
    """Requests of a load, in no particular order."""

    requests: list[SentRequest]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def answered(self) -> "RequestLog":
        return RequestLog([each for each in self.requests if each.error is None])

    @property
    def failed(self) -> "RequestLog":
        return RequestLog([each for each in self.requests if each.error is not None])

    @property
    def errors(self) -> Counter[str]:
        return Counter(each.kind for each in self.failed.requests)

    @property
    def messages(self) -> list[str]:
        return list({each.kind: each.error or "" for each in self.failed.requests}.values())

    def between(self, begins_s: float, ends_s: float = float("inf")) -> "RequestLog":
        return RequestLog([each for each in self.requests if begins_s <= each.planned_s < ends_s])

    def latency_ms(self, percent: float) -> float:
        """Percentile of the latency from the planned time; nan without requests."""
        return _percentile([each.latency_ms for each in self.requests], percent)

    def lag_ms(self, percent: float) -> float:
        """Percentile of the sending delay; nan without requests."""
        return _percentile([(each.sent_s - each.planned_s) * 1000 for each in self.requests], percent)


def _percentile(values: list[float], percent: float) -> float:
    return float(np.percentile(values, percent, method="inverted_cdf")) if values else float("nan")


class RequestRecorder:
    """Keeps every request; has the interface of `Recorder`."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.requests: list[SentRequest] = []

    def attempt(self, now_s: float) -> None:
        self.in_flight += 1

    def drop(self, planned_s: float, length: Length = NO_LENGTH) -> None:
        self.finish(planned_s, planned_s, planned_s, "dropped: too many requests in flight")

    def finish(
        self, planned_s: float, sent_s: float, finished_s: float, error: str | None, length: Length = NO_LENGTH
    ) -> None:
        self.in_flight -= 1
        self.requests.append(SentRequest(planned_s, sent_s, finished_s, error))
