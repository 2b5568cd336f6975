"""Measures the ratios of docs/benchmarks.md, each in one run on this machine.

Both sides of a ratio are measured in turn, many times. The table has the median of the pairs and its quartiles, and no
absolute times. Needs both models built (`make engine`, `make engine MODEL=minilm`). Writes `build/bench.json`.

Examples:
    python -m tests.bench
    python -m tests.bench --only served --pairs 20
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import Parser, build_dir, run_command
from tests.bench import client, engines, instrument, served, tuned
from tests.bench.setting import Bench, prepare

BENCHMARKS: dict[str, Callable[[Bench], None]] = {
    "served": served.served,
    "int8": engines.int8,
    "pruned": engines.pruned,
    "cached": engines.cached,
    "batching": served.batching,
    "client": client.client,
    "client-async": client.client_async,
    "client-memory": client.client_memory,
    "peer": instrument.peer,
    "accuracy": instrument.accuracy,
    "ceiling": instrument.ceiling,
    "encoding": instrument.encoding,
    "capacity": instrument.capacity,
    "tuned": tuned.tuned,
}
log = Console(stderr=True)


def main() -> None:
    """Runs the benchmarks and prints the table."""
    parser = Parser(__doc__, prog="python -m tests.bench")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--pairs", type=int, default=12, help="pairs per ratio (default: %(default)s)")
    args = parser.parse_args()
    result_path = build_dir("bench.json")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        bench = Bench(Path(folder), args.pairs)
        for name in args.only or BENCHMARKS:
            BENCHMARKS[name](bench)
    result_path.write_text(json.dumps(bench.results, indent=2) + "\n")
    table = Table("ratio of", box=box.SIMPLE_HEAD)
    for column in ("median", "quartiles", "pairs", ""):
        table.add_column(column, justify="right" if column else "left")
    for result in bench.results:
        low, high = result["quartiles"]
        table.add_row(
            result["name"], f"{result['ratio']:.2f}", f"{low:.2f} to {high:.2f}", str(result["pairs"]), result["goal"]
        )
    Console(width=max(Console().width, 110)).print(table)


if __name__ == "__main__":
    run_command(main)
