"""The rows of `measure-failure` and `measure-training`: what is required or promised, and what was seen here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import build_dir
from deepseek.spec.files.folders import write_whole


@dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    asked: str = ""
    seen: str
    holds: bool | None = None
    """None: shown, not judged."""


def conclude(rows: Sequence[Row], name: str, *, asked: str, as_json: bool = False) -> int:
    """Writes the rows to `build/<name>.json` and prints them; `asked` heads their column. Returns 1 if one does not hold."""
    text = json.dumps([asdict(row) for row in rows], indent=2)
    write_whole(build_dir(f"{name}.json"), text + "\n")
    if as_json:
        print(text)
    else:
        table = Table("", asked, "seen", "holds", box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(row.what, row.asked, row.seen, {None: "", True: "yes", False: "NO"}[row.holds])
        Console(width=max(Console().width, 150)).print(table)
    return int(any(row.holds is False for row in rows))
