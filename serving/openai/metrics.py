"""Counts what the routes do, and writes it in Prometheus' text format.

Contract: all counters start at 0 with the process. Labels have few values: declared routes, statuses, served models.
Source of the format: https://prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from deepseek.spec.metric_windows import OPENAI_BOUNDS_S

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DURATION = "openai_request_duration_seconds"


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self._texts: Counter[str] = Counter()  # by model
        self._tokens: Counter[str] = Counter()
        # by route, model, and whether the list was split; the last bucket has no end
        self._in_bucket: dict[tuple[str, str, bool], list[int]] = {}
        self._seconds: dict[tuple[str, str, bool], float] = {}

    def count_request(self, route: str, status: int, seconds: float, model: str = "", is_split: bool = False) -> None:
        """Counts an answered request. Status 499: its caller disconnected. `is_split`: it needed several batches."""
        timed = (route, model, is_split)
        self._requests[route, status] += 1
        self._in_bucket.setdefault(timed, [0] * (len(OPENAI_BOUNDS_S) + 1))[bisect_left(OPENAI_BOUNDS_S, seconds)] += 1
        self._seconds[timed] = self._seconds.get(timed, 0.0) + seconds

    def count_texts(self, model: str, texts: int, tokens: int) -> None:
        """Counts texts that ran, with their tokens after truncation."""
        self._texts[model] += texts
        self._tokens[model] += tokens

    def text(self) -> str:
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
        name = DURATION
        yield from _head(
            name, "histogram", "From the head of a request to its answer; split: it needed several batches"
        )
        for timed, in_bucket in sorted(self._in_bucket.items()):
            route, model, is_split = timed
            split = "yes" if is_split else "no"
            label, total = f'route="{_escaped(route)}",model="{_escaped(model)}",split="{split}"', 0
            for end, count in zip((*map(str, OPENAI_BOUNDS_S), "+Inf"), in_bucket, strict=True):
                total += count
                yield f'{name}_bucket{{{label},le="{end}"}} {total}'
            yield f"{name}_sum{{{label}}} {self._seconds[timed]}"
            yield f"{name}_count{{{label}}} {total}"


def _head(name: str, kind: str, meaning: str) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
