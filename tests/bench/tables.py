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


def _line(*cells: str, key: str, goal: Goal | None = None) -> Line:
    return Line(cells, (key,), goal)


def _server() -> Table:
    lines, defaults = [], "ONNX Runtime's defaults"
    for where, least in (("apart", 0.95), ("shared", 0.92)):
        at = f"served {where}: minilm"
        lines += [
            _line("MiniLM, fp32", where, "fastest", key=f"{at} fp32 over raw", goal=Goal(least=least)),
            _line("the same with `p99_ms = 1000`", where, "fastest", key=f"{at} fp32 of 1 s over raw"),
            _line("MiniLM, fp32", where, defaults, key=f"{at} fp32 over raw defaults", goal=Goal(least=0.98)),
            _line(
                "MiniLM, `PRECISION=auto`",
                where,
                f"{defaults}, fp32",
                key=f"{at} auto over raw defaults",
                goal=Goal(least=1.6),
            ),
        ]
    for where, goal in (("apart", Goal(least=0.6)), ("shared", None)):
        lines.append(
            _line("recommender, fp32", where, "fastest", key=f"served {where}: recommender fp32 over raw", goal=goal)
        )
    return Table(("model", "load generator", "over the raw session"), tuple(lines))


def _text() -> Table:
    lines = []
    for where, least in (("apart", 0.9), ("shared", None)):
        at, goal = f"text {where}:", least and Goal(least=least)
        lines += [
            _line("fp32 over raw", where, key=f"{at} fp32 over raw", goal=goal or None),
            _line("`PRECISION=auto` over raw int8", where, key=f"{at} PRECISION=auto over raw", goal=goal or None),
            _line("fp32 over infinity-emb", where, key=f"{at} fp32 over infinity-emb", goal=Goal(least=1.5)),
            _line("fp32 over FastAPI", where, key=f"{at} fp32 over FastAPI", goal=Goal(least=2)),
            _line("`PRECISION=auto` over infinity-emb", where, key=f"{at} PRECISION=auto over infinity-emb"),
            _line("`PRECISION=auto` over FastAPI", where, key=f"{at} PRECISION=auto over FastAPI"),
        ]
    at = "text apart:"
    lines[2:2] = [
        _line("fp32 over raw, gRPC", "apart", key=f"{at} fp32, gRPC over raw", goal=Goal(least=0.9)),
        _line(
            "`PRECISION=auto` over raw int8, gRPC",
            "apart",
            key=f"{at} PRECISION=auto, gRPC over raw",
            goal=Goal(least=0.9),
        ),
        _line("fp32 over raw; one instance, `queue_timeout_ms = 10000`", "apart", key=f"{at} tuned over raw"),
        _line(
            "texts over ids padded to multiples of 16, fp32", "apart", key=f"{at} fp32 over ids", goal=Goal(least=1.3)
        ),
        _line("`/v1/embeddings` over KServe v2, fp32", "apart", key=f"{at} v1 over fp32", goal=Goal(least=0.95)),
    ]
    return Table(("texts/s", "load generator"), tuple(lines))


def _text_tails() -> Table:
    at_70 = "p99 at 70 % of raw fp32, Poisson arrivals:"
    lines = [
        _line(f"{at_70} {shown} over {peer}", key=f"text p99: {precision} over {peer}", goal=goal)
        for precision, shown, goal in (("fp32", "fp32", Goal(most=0.5)), ("PRECISION=auto", "`PRECISION=auto`", None))
        for peer in ("infinity-emb", "FastAPI")
    ]
    lines.append(
        _line(
            "p99 of short texts beside a caller of 128-token texts without pause, over alone, fp32",
            key="text p99: beside long over alone",
            goal=Goal(most=2),
        )
    )
    return Table(("measured",), tuple(lines))


def _client() -> Table:
    goal = Goal(most=1.1)
    lines = [
        *(
            _line("p50", "tritonclient", name, key=f"client p50 over tritonclient: {key}", goal=goal)
            for key, name in PROTOCOLS
        ),
        *(
            _line("p50", "perf_analyzer (C++)", name, key=f"client p50 over perf_analyzer: {key}")
            for key, name in PROTOCOLS
        ),
        *(
            _line(
                "requests/s of one core, asyncio",
                "tritonclient's asyncio",
                name,
                key=f"client asyncio requests/s over tritonclient: {key}",
            )
            for key, name in PROTOCOLS
        ),
        *(
            _line(
                "p50 of 8 MB each way through shared memory",
                "through the socket",
                name,
                key=f"client shared memory over socket: {key}",
            )
            for key, name in PROTOCOLS
        ),
    ]
    return Table(("measured", "over", "protocol"), tuple(lines))


PROTOCOLS = (("grpc", "gRPC"), ("http", "HTTP"))
PERCENTS = ("50", "90", "99", "99.9")
NEAR, ONE_PERCENT = Goal(0.95, 1.05), Goal(0.98, 1.02)
TABLES = {
    "server": _server(),
    "batching": Table(
        ("model",),
        tuple(
            _line(name, key=f"batching: {key} on over off")
            for key, name in (("minilm", "MiniLM, fp32"), ("recommender", "recommender, fp32"))
        ),
    ),
    "bulk": Table(
        ("model",),
        (
            _line("recommender", key="bulk: recommender", goal=Goal(most=2)),
            _line("MiniLM by text", key="bulk: minilm text", goal=Goal(most=2)),
        ),
    ),
    "text": _text(),
    "text-tails": _text_tails(),
    "text-vectors": Table(
        ("measured",),
        (
            _line(
                "smallest cosine with sentence-transformers, of 2,000 texts with emoji, control characters, empty ones and 100 kB",
                key="text vectors: smallest cosine",
                goal=Goal(least=0.9999),
            ),
        ),
    ),
    "int8": Table(
        ("model", "batch"),
        tuple(
            _line(name, str(batch), key=f"int8 over fp32: {key} batch {batch}")
            for key, name, sizes in (("minilm", "MiniLM", (1, 8, 32)), ("recommender", "recommender", (1, 16, 64)))
            for batch in sizes
        ),
    ),
    "int8-size": Table(
        ("model",),
        tuple(
            _line(name, key=f"int8 size over fp32: {key}")
            for key, name in (("minilm", "MiniLM"), ("recommender", "recommender"))
        ),
    ),
    "client": _client(),
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
    "generator": Table(
        ("measured", "protocol"),
        (
            _line(
                "requests/s of one core over perf_analyzer's",
                "gRPC",
                key="generator requests/s: grpc",
                goal=Goal(least=0.68),
            ),
            _line(
                "requests/s of one core over perf_analyzer's",
                "HTTP",
                key="generator requests/s: http",
                goal=Goal(least=0.8),
            ),
            *(
                _line(
                    "send lag p99 at half of that rate, ms",
                    name,
                    key=f"generator send lag, ms: {key}",
                    goal=Goal(most=1),
                )
                for key, name in PROTOCOLS
            ),
            *(
                _line(
                    "CPU of a request encoded once over one encoded each time, 600 kB",
                    name,
                    key=f"generator encoding: {key}",
                )
                for key, name in PROTOCOLS
            ),
        ),
    ),
}
KEYS = {key: (table, line) for table in TABLES.values() for line in table.lines for key in line.keys if key}
README = (
    (
        "What does Triton cost? MiniLM served, over the fastest raw ONNX Runtime session",
        "{served apart: minilm fp32 over raw} of its throughput (load generator on another core)",
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
