"""Measures the ratios of docs/benchmarks.md in parts, each in one run on this machine and in less than five minutes.

Both sides of a ratio are measured in turn, many times. The table has the median of the pairs and its quartiles, and no
absolute times. Needs both models built (`make engine`, `make engine MODEL=minilm`). Writes a JSON file and a chart (SVG)
for each part to `build/bench/`; `python -m tests.bench.publish` puts these results into the pages.

Examples:
    python -m tests.bench
    python -m tests.bench --parts server,client     # server-apart, server-shared and client
    python -m tests.bench --parts bulk --pairs 20
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import InputError, Parser, build_dir, run_command
from tests.bench import client, engines, instrument, served, text
from tests.bench.results import Ratio, Run, write
from tests.bench.setting import Bench, log


@dataclass(frozen=True)
class Part:
    """What `--parts` names."""

    seconds: int
    """About how long it takes on two quiet cores: the seconds of all sides and rounds, and of what is set up."""
    benchmarks: tuple[Callable[[Bench], None], ...]


PARTS = {
    "server-apart": Part(260, (served.apart,)),
    "server-shared": Part(270, (served.shared,)),
    "recommender": Part(200, (served.recommender,)),
    "batching": Part(210, (served.batching,)),
    "bulk": Part(180, (served.bulk,)),
    "int8": Part(150, (engines.int8,)),
    "client": Part(200, (client.client, client.client_async, client.client_memory)),
    "accuracy": Part(220, (instrument.accuracy,)),
    "generator": Part(150, (instrument.ceiling, instrument.encoding)),
    "peer": Part(190, (instrument.peer,)),
    "text-apart": Part(260, (text.apart,)),
    "text-shared": Part(270, (text.shared,)),
    "text-vectors": Part(90, (text.vectors,)),
}
LONGEST_S = 300


def chosen(names: str) -> list[str]:
    """The parts that a list with commas names; `server` is all parts that begin with `server-`."""
    found = {name: [part for part in PARTS if f"{part}-".startswith(f"{name}-")] for name in names.split(",")}
    if wrong := [name for name, parts in found.items() if not parts]:
        raise InputError(f"--parts {','.join(wrong)}: no such part; allowed: {', '.join(PARTS)}")
    return list(dict.fromkeys(part for parts in found.values() for part in parts))


def main() -> None:
    """Runs the benchmarks and prints the table."""
    parser = Parser(__doc__, prog="python -m tests.bench")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, with commas (default: %(default)s)")
    parser.add_argument("--pairs", type=int, help="pairs of every ratio (default: as many as five minutes allow)")
    args = parser.parse_args()
    parts = chosen(args.parts)
    log.print(f"about {sum(PARTS[part].seconds for part in parts) / 60:.0f} min: {', '.join(parts)}")
    results: list[Ratio] = []
    for number, part in enumerate(parts, 1):
        log.print(f"{part}: part {number} of {len(parts)}, about {PARTS[part].seconds} s")
        start_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
            bench = Bench(Path(folder), args.pairs)
            for benchmark in PARTS[part].benchmarks:
                benchmark(bench)
        run = Run.here(part, bench.results, took_s=time.perf_counter() - start_s, shortened=bench.shortened)
        write(run, build_dir("bench") / f"{part}.json")
        log.print(f"{part}: took {run.took_s:.0f} s")
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
