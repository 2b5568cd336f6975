"""`deepseek bench`: measures the ratios of docs/benchmarks.md in parts, each in less than five minutes.

Both sides of a ratio are measured in turn, many times. The table has the median of the pairs and its quartiles, and no
absolute times. Needs both models built (`make engine`, `make engine MODEL=minilm`). Writes a JSON file and a chart (SVG)
for each part to `build/bench/`; `python -m tests.bench.publish` puts these results into the pages.
"""

from __future__ import annotations

import argparse
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

from deepseek.spec import build_dir
from tests.bench import client, engines, instrument, served, text
from tests.bench.results import Ratio, Run, write
from tests.bench.setting import Bench, chosen, log


@dataclass(frozen=True)
class Part:
    """What `--bench` names."""

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
    "text-apart": Part(290, (text.apart,)),
    "text-shared": Part(270, (text.shared,)),
    "text-vectors": Part(90, (text.vectors,)),
}
LONGEST_S = 300


def main(options: argparse.Namespace) -> None:
    """Runs the benchmarks and prints the table."""
    parts = chosen("--bench", options.bench, PARTS)
    log.print(f"about {sum(PARTS[part].seconds for part in parts) / 60:.0f} min: {', '.join(parts)}")
    results: list[Ratio] = []
    for number, part in enumerate(parts, 1):
        log.print(f"{part}: part {number} of {len(parts)}, about {PARTS[part].seconds} s")
        start_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
            bench = Bench(Path(folder), options.pairs)
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
