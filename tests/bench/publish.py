"""Puts the results of `build/bench/` into `docs/benchmarks.json`, and writes the tables of the pages from it.

Contract: a result replaces the published one of the same key; others stay. Runs with fewer pairs than the default are
left out. A table of a page begins at a line that ends in `<!-- bench: NAME -->` and ends before the next heading; the rest
of the page is written by hand. `tests/test_bench_results.py` checks that the pages are current.

Example:
    make bench && python -m tests.bench.publish
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deepseek.spec import build_dir
from deepseek.spec.command import exit_code
from deepseek.spec.files.folders import write_whole
from tests.bench.results import PUBLISHED, Ratio, Run, merged, read, text
from tests.bench.run import PARTS
from tests.bench.tables import README, TABLES, Line, Table

PAGES = (Path("docs/benchmarks.md"), Path("README.md"))
PLACE = re.compile(r"(<!-- bench: (\S+) -->\n).*?(?=\n#|\Z)", re.DOTALL)


def main() -> None:
    """Merges the results, and writes the pages."""
    published = read(PUBLISHED)
    for part in PARTS:
        path = build_dir("bench") / f"{part}.json"
        if not path.is_file():
            continue
        new = read(path)
        if any(run.shortened for run in new):
            print(f"skipped   {path}: fewer pairs than the default")
            continue
        published = merged(published, new)
        print(f"taken     {path}")
    write_whole(PUBLISHED, text(published))
    for page in PAGES:
        write_whole(page, filled(page.read_text(), published))


def filled(page: str, runs: Sequence[Run]) -> str:
    """A page with the tables that these runs give."""
    found = {each.key: (each, number) for number, run in enumerate(runs) for each in run.ratios}
    made: dict[str, Callable[[], list[str]]] = {"readme": lambda: readme_table(found)}
    made |= {name: lambda table=table: benchmark_table(table, found, runs) for name, table in TABLES.items()}  # type: ignore[misc]
    return PLACE.sub(lambda place: place[1] + "\n".join(["", *made[place[2]](), ""]), page)


def readme_table(found: Mapping[str, tuple[Ratio, int]]) -> list[str]:
    """The README's results."""

    def value(key: re.Match[str]) -> str:
        ratio = found[key[2]][0]
        return ratio.note if key[1] else f"{ratio.ratio:.2f}"

    rows = [f"| {question} | {re.sub(r'{(note of )?(.+?)}', value, answer)} |" for question, answer in README]
    return ["| question | result |", "|---|---|", *rows]


def benchmark_table(table: Table, found: Mapping[str, tuple[Ratio, int]], runs: Sequence[Run]) -> list[str]:
    """A table, and below it where its results are from. Rows without a result or a goal are left out."""
    shown = [line for line in table.lines if line.goal or any(key in found for key in line.keys)]
    used = sorted({found[key][1] for line in shown for key in line.keys if key in found})
    goals, several = any(line.goal for line in shown), len(used) > 1
    results = table.results or ("value", "spread")
    heads = [*table.heads, *results, *(("goal", "result") if goals else ("note",)), *(("run",) if several else ())]
    rows = [heads]
    for line in shown:
        has = [found.get(key) for key in line.keys]
        measured = [each[0] for each in has if each]
        if table.results:
            values = [_shown(each[0]) if each else "" for each in has]
        else:
            values = [measured[0].value, _spread(measured[0])] if measured else ["", ""]
        notes = "; ".join(dict.fromkeys(each.note for each in measured if each.note))
        end = [str(line.goal or ""), "; ".join(filter(None, (_verdict(line, measured), notes)))] if goals else [notes]
        numbers = sorted({used.index(each[1]) + 1 for each in has if each})
        rows.append([*line.label, *values, *end, *([", ".join(map(str, numbers))] if several else [])])
    where = [f"{f'Run {place + 1}' if several else 'Measured'}: {runs[number]}." for place, number in enumerate(used)]
    head, *rest = (f"| {' | '.join(cells)} |" for cells in rows)
    return [head, "|" + "---|" * len(heads), *rest, *(["", " ".join(where)] if where else [])]


def _shown(ratio: Ratio) -> str:
    spread = _spread(ratio)
    return f"{ratio.value} ({spread})" if spread else ratio.value


def _spread(ratio: Ratio) -> str:
    low, high = map(ratio.text, ratio.quartiles)
    return "" if low == high else f"{low} to {high}"


def _verdict(line: Line, measured: Sequence[Ratio]) -> str:
    if not line.goal:
        return ""
    if not measured:
        return "not measured yet"
    return "met" if all(each.met for each in measured) else "**missed**"


if __name__ == "__main__":
    sys.exit(exit_code(main))
