"""Counts what the routes do, and writes it in Prometheus' text format.

Contract: all counters start at 0 with the process. Labels have few values: declared routes, statuses, served models.
Source of the format: https://prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self._texts: Counter[str] = Counter()  # by model
        self._tokens: Counter[str] = Counter()
        self._in_bucket: dict[str, list[int]] = {}  # by route; the last bucket has no end
        self._seconds: dict[str, float] = {}

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request. Status 499: its caller disconnected."""
        self._requests[route, status] += 1
        self._in_bucket.setdefault(route, [0] * (len(BUCKETS_S) + 1))[bisect_left(BUCKETS_S, seconds)] += 1
        self._seconds[route] = self._seconds.get(route, 0.0) + seconds

    def count_texts(self, model: str, texts: int, tokens: int) -> None:
        """Counts texts that ran, with their tokens after truncation."""
        self._texts[model] += texts
        self._tokens[model] += tokens

    def text(self) -> str:
        """All metrics."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        yield from _head("openai_requests_total", "counter", "Answered requests; status 499: the caller disconnected")
        for (route, status), count in sorted(self._requests.items()):
            yield f'openai_requests_total{{route="{_escaped(route)}",status="{status}"}} {count}'
        for name, meaning, counts in (
            ("openai_texts_total", "Texts that ran", self._texts),
            ("openai_tokens_total", "Tokens that ran, after truncation", self._tokens),
        ):
            yield from _head(name, "counter", meaning)
            for model, count in sorted(counts.items()):
                yield f'{name}{{model="{_escaped(model)}"}} {count}'
        name = "openai_request_duration_seconds"
        yield from _head(name, "histogram", "From the head of a request to its answer")
        for route, in_bucket in sorted(self._in_bucket.items()):
            label, total = f'route="{_escaped(route)}"', 0
            for end, count in zip((*map(str, BUCKETS_S), "+Inf"), in_bucket, strict=True):
                total += count
                yield f'{name}_bucket{{{label},le="{end}"}} {total}'
            yield f"{name}_sum{{{label}}} {self._seconds[route]}"
            yield f"{name}_count{{{label}}} {total}"


def _head(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
