"""The results of a benchmark: their file and their chart, and the file of those that the pages show.

Contract: a part's results are one JSON file, with the machine and the versions that they were measured with, and one SVG
file of the same name. `docs/benchmarks.json` holds runs in the same format, each key in one run only.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deepseek.spec.files.folders import write_whole
from deepseek.spec.machine.cpu import int8_instructions, this_cpu
from tests.bench.chart import Bar, bar_chart
from tests.bench.tables import KEYS, Goal

PUBLISHED = Path("docs/benchmarks.json")
PACKAGES = ("onnxruntime", "nvidia-pytriton", "tritonclient", "numpy", "torch")
"""Each run records their versions."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One result."""

    key: str
    ratio: float
    """The median of the pairs."""
    quartiles: tuple[float, float]
    pairs: int | None
    """None: not recorded."""
    note: str = ""

    @classmethod
    def of(cls, key: str, ratios: Sequence[float], note: str = "") -> Ratio:
        """The median and the quartiles of the pairs; one pair is its own quartiles."""
        low, middle, high = statistics.quantiles([*ratios] * (2 if len(ratios) == 1 else 1), n=4, method="inclusive")
        return cls(key=key, ratio=middle, quartiles=(low, high), pairs=len(ratios), note=note)

    @property
    def name(self) -> str:
        """Its label in one line."""
        table, line = KEYS[self.key]
        return table.text(line, self.key)

    @property
    def goal(self) -> Goal | None:
        return KEYS[self.key][1].goal

    def text(self, value: float) -> str:
        """A value of this ratio, with as many decimals as its goal has, but at least two."""
        bounds = self.goal.bounds if self.goal else []
        return f"{value:.{max(2, *(len(str(bound).partition('.')[2]) for bound in bounds), 0)}f}"

    @property
    def value(self) -> str:
        """The ratio as text."""
        return self.text(self.ratio)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None without a goal."""
        return None if self.goal is None else self.goal.met(self.ratio)

    @property
    def said(self) -> str:
        """The goal, whether it is met, and the note."""
        verdict = f"goal: {self.goal}, {'met' if self.met else 'missed'}" if self.goal else ""
        return "; ".join(filter(None, (verdict, self.note)))


@dataclass(frozen=True, kw_only=True)
class Run:
    """The results of one part, with machine, versions and date. None: not recorded."""

    part: str
    date: str | None = None
    commit: str | None = None
    cpu: str | None = None
    int8: tuple[str, ...] | None = None
    """The instructions of the CPU for products of 8-bit integers."""
    cores: int | None = None
    packages: Mapping[str, str] | None = None
    took_s: float | None = None
    shortened: bool = False
    """With fewer pairs than the default: not for the pages."""
    ratios: tuple[Ratio, ...]

    @classmethod
    def here(cls, part: str, ratios: Iterable[Ratio], *, took_s: float, shortened: bool) -> Run:
        """A run of now, on this machine."""
        cpu = this_cpu()
        described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        return cls(
            part=part,
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            commit=described.stdout.strip() or None,
            cpu=cpu.model,
            int8=int8_instructions(),
            cores=cpu.cores,
            packages={name: version(name) for name in PACKAGES},
            took_s=round(took_s),
            shortened=shortened,
            ratios=tuple(ratios),
        )

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Run:
        """A run of a file."""
        ratios = (Ratio(**{**each, "quartiles": tuple(each["quartiles"])}) for each in found["ratios"])
        int8 = found.get("int8")
        return cls(**{**found, "ratios": tuple(ratios), "int8": None if int8 is None else tuple(int8)})

    def __str__(self) -> str:
        """The source of its results, for the pages."""
        if self.cpu is None:
            machine = "CPU not recorded"
        else:
            extra = "no 8-bit dot products" if not self.int8 else ", ".join(self.int8)
            machine = f"{self.cpu} ({extra})"
        cores = f"{self.cores} cores" if self.cores else ""
        commit = f"commit {self.commit}" if self.commit else ""
        return ", ".join(filter(None, (self.part, self.date or "date not recorded", machine, cores, commit)))


def write(run: Run, path: Path) -> None:
    """Writes `path` (JSON) and the chart beside it, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text([run]))
    write_whole(path.with_suffix(".svg"), chart(run.ratios, title=path.stem))


def text(runs: Iterable[Run]) -> str:
    """The file of some runs; what was not recorded is left out."""
    found = [{key: value for key, value in asdict(run).items() if value not in (None, False)} for run in runs]
    return json.dumps({"runs": found}, indent=1, ensure_ascii=False) + "\n"


def read(path: Path) -> list[Run]:
    """The runs of a file; none if an older version wrote it."""
    return [Run.of(each) for each in json.loads(path.read_text()).get("runs", ())]


def merged(published: Iterable[Run], new: Iterable[Run]) -> list[Run]:
    """The newest result of each key that a table has, in its run."""
    taken, found = set[str](), list[Run]()
    for run in reversed([*published, *new]):
        kept = tuple(each for each in run.ratios if each.key in KEYS and each.key not in taken)
        taken.update(each.key for each in kept)
        if kept:
            found.append(replace(run, ratios=kept))
    return found[::-1]


def chart(results: Sequence[Ratio], title: str) -> str:
    """A bar for each ratio, with its quartiles and its goal."""
    bars = []
    for each in results:
        low, high = each.quartiles
        text = f"{each.ratio:.2f} ({low:.2f} to {high:.2f})"
        bars.append(
            Bar(
                name=each.name,
                values=(low, each.ratio, high),
                text="; ".join(filter(None, (text, each.said))),
                bounds=each.goal.bounds if each.goal else (),
                missed=each.met is False,
            )
        )
    return bar_chart(title, bars)
