"""The tables of docs/benchmarks.md: for each row its label, the key of its result, and its goal.

Contract: a benchmark records a result under a key of `KEYS`; a key never changes. A row has one result, or several that
stand side by side. Every row is what `make engine && make serve` gives, unless its label says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """Bounds of a ratio; None for no bound."""

    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        if self.least is None:
            return f"at most {self.most:g}"
        return f"at least {self.least:g}" if self.most is None else f"{self.least:g} to {self.most:g}"

    def met(self, ratio: float) -> bool:
        """Whether the ratio is inside the bounds."""
        return (self.least is None or ratio >= self.least) and (self.most is None or ratio <= self.most)

    @property
    def bounds(self) -> list[float]:
        return [bound for bound in (self.least, self.most) if bound is not None]


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    label: tuple[str, ...]
    keys: tuple[str, ...]
    goal: Goal | None = None


@dataclass(frozen=True)
class Table:
    """A table: the heads of its label and, if rows have several results, of these."""

    heads: tuple[str, ...]
    lines: tuple[Line, ...]
    results: tuple[str, ...] = ()

    def text(self, line: Line, key: str) -> str:
        """A key's label in one line."""
        return ", ".join(filter(None, (*line.label, *(self.results[line.keys.index(key) :][:1]))))


def _table(heads: str, rows: str) -> Table:
    """A table from text, a row on each line: the cells of its label | its key | its goal, if it has one."""
    lines = []
    for row in rows.strip().splitlines():
        *label, key, goal = (cell.strip() for cell in row.split("|"))
        lines.append(Line(tuple(label), (key,), _goal(goal)))
    return Table(tuple(head.strip() for head in heads.split("|")), tuple(lines))


def _goal(text: str) -> Goal | None:
    if not text:
        return None
    bound = float(text[2:])
    return Goal(least=bound) if text.startswith(">=") else Goal(most=bound)


PROTOCOLS = (("grpc", "gRPC"), ("http", "HTTP"))
PERCENTS = ("50", "90", "99", "99.9")
NEAR, ONE_PERCENT = Goal(0.95, 1.05), Goal(0.98, 1.02)
TABLES = {
    "server": _table(
        "model | load generator | over the raw session",
        """
        MiniLM, fp32 | apart | fastest | served apart: minilm fp32 over raw | >= 0.95
        the same with `p99_ms = 1000` | apart | fastest | served apart: minilm fp32 of 1 s over raw |
        MiniLM, fp32 | apart | ONNX Runtime's defaults | served apart: minilm fp32 over raw defaults | >= 0.98
        MiniLM, `PRECISION=auto` | apart | ONNX Runtime's defaults, fp32 | served apart: minilm auto over raw defaults | >= 1.6
        MiniLM, fp32 | shared | fastest | served shared: minilm fp32 over raw | >= 0.92
        the same with `p99_ms = 1000` | shared | fastest | served shared: minilm fp32 of 1 s over raw |
        MiniLM, fp32 | shared | ONNX Runtime's defaults | served shared: minilm fp32 over raw defaults | >= 0.98
        MiniLM, `PRECISION=auto` | shared | ONNX Runtime's defaults, fp32 | served shared: minilm auto over raw defaults | >= 1.6
        recommender, fp32 | apart | fastest | served apart: recommender fp32 over raw | >= 0.6
        recommender, fp32 | shared | fastest | served shared: recommender fp32 over raw |
        """,
    ),
    "batching": _table(
        "model",
        """
        MiniLM, fp32 | batching: minilm on over off |
        recommender, fp32 | batching: recommender on over off |
        """,
    ),
    "bulk": _table(
        "model",
        """
        recommender | bulk: recommender | <= 2
        MiniLM by text | bulk: minilm text | <= 2
        """,
    ),
    "text": _table(
        "texts/s | load generator",
        """
        fp32 over raw | apart | text apart: fp32 over raw | >= 0.9
        `PRECISION=auto` over raw int8 | apart | text apart: PRECISION=auto over raw | >= 0.9
        fp32 over raw, gRPC | apart | text apart: fp32, gRPC over raw | >= 0.9
        `PRECISION=auto` over raw int8, gRPC | apart | text apart: PRECISION=auto, gRPC over raw | >= 0.9
        fp32 over raw; one instance, `queue_timeout_ms = 10000` | apart | text apart: tuned over raw |
        texts over ids padded to multiples of 16, fp32 | apart | text apart: fp32 over ids | >= 1.3
        the same; one instance, `queue_timeout_ms = 10000` | apart | text apart: tuned over ids |
        `/v1/embeddings` over KServe v2, fp32 | apart | text apart: v1 over fp32 | >= 0.95
        the same; one instance, `queue_timeout_ms = 10000` | apart | text apart: v1 over tuned |
        fp32 over infinity-emb | apart | text apart: fp32 over infinity-emb | >= 1.5
        fp32 over FastAPI | apart | text apart: fp32 over FastAPI | >= 2
        `PRECISION=auto` over infinity-emb | apart | text apart: PRECISION=auto over infinity-emb |
        `PRECISION=auto` over FastAPI | apart | text apart: PRECISION=auto over FastAPI |
        fp32 over raw | shared | text shared: fp32 over raw |
        `PRECISION=auto` over raw int8 | shared | text shared: PRECISION=auto over raw |
        fp32 over infinity-emb | shared | text shared: fp32 over infinity-emb | >= 1.5
        fp32 over FastAPI | shared | text shared: fp32 over FastAPI | >= 2
        `PRECISION=auto` over infinity-emb | shared | text shared: PRECISION=auto over infinity-emb |
        `PRECISION=auto` over FastAPI | shared | text shared: PRECISION=auto over FastAPI |
        """,
    ),
    "text-tails": _table(
        "measured",
        """
        p99 at 70 % of raw fp32, Poisson arrivals: fp32 over infinity-emb | text p99: fp32 over infinity-emb | <= 0.5
        p99 at 70 % of raw fp32, Poisson arrivals: fp32 over FastAPI | text p99: fp32 over FastAPI | <= 0.5
        p99 at 70 % of raw fp32, Poisson arrivals: `PRECISION=auto` over infinity-emb | text p99: PRECISION=auto over infinity-emb |
        p99 at 70 % of raw fp32, Poisson arrivals: `PRECISION=auto` over FastAPI | text p99: PRECISION=auto over FastAPI |
        p99 of short texts beside a caller of 128-token texts without pause, over alone, fp32 | text p99: beside long over alone | <= 2
        """,
    ),
    "text-vectors": _table(
        "measured",
        """
        smallest cosine with sentence-transformers, of 2,000 texts with emoji, control characters, empty ones and 100 kB | text vectors: smallest cosine | >= 0.9999
        """,
    ),
    "int8": _table(
        "model | batch",
        """
        MiniLM | 1 | int8 over fp32: minilm batch 1 |
        MiniLM | 8 | int8 over fp32: minilm batch 8 |
        MiniLM | 32 | int8 over fp32: minilm batch 32 |
        recommender | 1 | int8 over fp32: recommender batch 1 |
        recommender | 16 | int8 over fp32: recommender batch 16 |
        recommender | 64 | int8 over fp32: recommender batch 64 |
        """,
    ),
    "int8-size": _table(
        "model",
        """
        MiniLM | int8 size over fp32: minilm |
        recommender | int8 size over fp32: recommender |
        """,
    ),
    "client": _table(
        "measured | over | protocol",
        """
        p50 | tritonclient | gRPC | client p50 over tritonclient: grpc | <= 1.1
        p50 | tritonclient | HTTP | client p50 over tritonclient: http | <= 1.1
        p50 | perf_analyzer (C++) | gRPC | client p50 over perf_analyzer: grpc |
        p50 | perf_analyzer (C++) | HTTP | client p50 over perf_analyzer: http |
        requests/s of one core, asyncio | tritonclient's asyncio | gRPC | client asyncio requests/s over tritonclient: grpc |
        requests/s of one core, asyncio | tritonclient's asyncio | HTTP | client asyncio requests/s over tritonclient: http |
        p50 of 8 MB each way through shared memory | through the socket | gRPC | client shared memory over socket: grpc |
        p50 of 8 MB each way through shared memory | through the socket | HTTP | client shared memory over socket: http |
        """,
    ),
    "accuracy": Table(
        ("protocol",),
        tuple(
            Line(
                (name,),
                (*(f"reported p{percent}: {key}" for percent in PERCENTS), f"stall, open loop: {key}"),
                ONE_PERCENT,
            )
            for key, name in PROTOCOLS
        )
        + tuple(
            Line((f"{name}, {how}",), ("", "", "", "", f"stall, {loop}: {key}"))
            for loop, how in (("closed loop", "a closed loop"), ("perf_analyzer", "perf_analyzer's closed loop"))
            for key, name in PROTOCOLS
        ),
        (*(f"p{percent}" for percent in PERCENTS), "p99.9 with a stall of 2 s"),
    ),
    "peer": Table(
        ("protocol",),
        tuple(
            Line(
                (name,),
                tuple(f"load test over perf_analyzer, {what}: {key}" for what in ("throughput", "p50", "p99")),
                NEAR,
            )
            for key, name in PROTOCOLS
        ),
        ("throughput", "p50", "p99"),
    ),
    "generator": _table(
        "measured | protocol",
        """
        requests/s of one core over perf_analyzer's | gRPC | generator requests/s: grpc | >= 0.68
        requests/s of one core over perf_analyzer's | HTTP | generator requests/s: http | >= 0.8
        send lag p99 at half of that rate, ms | gRPC | generator send lag, ms: grpc | <= 1
        send lag p99 at half of that rate, ms | HTTP | generator send lag, ms: http | <= 1
        CPU of a request encoded once over one encoded each time, 600 kB | gRPC | generator encoding: grpc |
        CPU of a request encoded once over one encoded each time, 600 kB | HTTP | generator encoding: http |
        """,
    ),
}
KEYS = {key: (table, line) for table in TABLES.values() for line in table.lines for key in line.keys if key}
README = (
    (
        "What does Triton cost? MiniLM served, over the fastest raw ONNX Runtime session",
        "{served apart: minilm fp32 over raw} of its throughput with 32 requests in flight. One core cannot answer 32 in time, and refuses the rest. "
        "{served apart: minilm fp32 of 1 s over raw} if the SLO allows 1 s",
    ),
    (
        "What does INT8 give? MiniLM, batch 8, over FP32",
        "{int8 over fp32: minilm batch 8} times as fast, less on CPUs without VNNI; {note of int8 over fp32: minilm batch 8}",
    ),
    (
        "What does the client cost? Its p50 over bare tritonclient's",
        "{client p50 over tritonclient: grpc} over gRPC, {client p50 over tritonclient: http} over HTTP",
    ),
    (
        "Can you trust the load test? Reported p99 over the true one",
        "{reported p99: grpc}, where 1 is right; {stall, open loop: grpc} for p99.9 with a stall of 2 s",
    ),
    (  # `make measure-failure`
        "What happens when the server is killed under load? Client with retries",
        "705 calls, none lost; serving again after 1.3 s",
    ),
)
"""The README's results: {a key} stands for its value, {note of a key} for its note."""
