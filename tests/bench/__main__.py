"""Measures the ratios of docs/benchmarks.md, each in one run on this machine.

Both sides of a ratio are measured in turn, many times. The table has the median of the pairs and its quartiles, and no
absolute times. Needs both models built (`make engine`, `make engine MODEL=minilm`); the part `text` needs only minilm. Writes a JSON file and a chart (SVG)
for each part to `build/bench/`.

Examples:
    python -m tests.bench
    python -m tests.bench --parts server,client
    python -m tests.bench --only served --pairs 20
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import InputError, Parser, run_command
from tests.bench import client, engines, instrument, served, text, tuned
from tests.bench.results import Ratio, write
from tests.bench.setting import MODELS, Bench, prepare

PARTS: dict[str, dict[str, Callable[[Bench], None]]] = {
    "server": {"served": served.served, "batching": served.batching},
    "engine": {"int8": engines.int8, "pruned": engines.pruned, "cached": engines.cached},
    "client": {
        "client": client.client,
        "client-async": client.client_async,
        "client-memory": client.client_memory,
    },
    "generator": {
        "peer": instrument.peer,
        "accuracy": instrument.accuracy,
        "ceiling": instrument.ceiling,
        "encoding": instrument.encoding,
    },
    "capacity": {"capacity": instrument.capacity},
    "tuned": {"tuned": tuned.tuned},
    "text": {"text-apart": text.apart, "text-shared": text.shared, "text-vectors": text.vectors},
}
log = Console(stderr=True)


def main() -> None:
    """Runs the benchmarks and prints the table."""
    parser = Parser(__doc__, prog="python -m tests.bench")
    names = [name for part in PARTS.values() for name in part]
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, with commas (default: %(default)s)")
    parser.add_argument("--only", choices=names, action="append", help="only this benchmark (may be repeated)")
    parser.add_argument("--pairs", type=int, default=12, help="pairs per ratio (default: %(default)s)")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if wrong := [part for part in parts if part not in PARTS]:
        raise InputError(f"--parts {','.join(wrong)}: no such part; allowed: {', '.join(PARTS)}")
    models = ("minilm",) if parts == ["text"] else MODELS
    results: list[Ratio] = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), models)
        bench = Bench(Path(folder), args.pairs, models)
        for part in parts:
            bench.results = []
            for name, benchmark in PARTS[part].items():
                if not args.only or name in args.only:
                    benchmark(bench)
            if bench.results:
                write(bench.results, bench.files / f"{part}.json")
                results += bench.results
    table = Table("ratio of", box=box.SIMPLE_HEAD)
    for column in ("median", "quartiles", "pairs", ""):
        table.add_column(column, justify="right" if column else "left")
    for result in results:
        low, high = result.quartiles
        table.add_row(result.name, f"{result.ratio:.2f}", f"{low:.2f} to {high:.2f}", str(result.pairs), result.said)
    Console(width=max(Console().width, 110)).print(table)


if __name__ == "__main__":
    run_command(main)
