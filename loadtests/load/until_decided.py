"""Measures until every objective is decided, or the time is over.

Contract: the run is judged at planned looks: after its length, and each time it has doubled. All looks share the error
of `slo.confidence` equally (Bonferroni), whatever look ends the run, and the run records how many were planned. So
looking often does not make a wrong verdict more likely. Between two looks the load pauses for a warm-up. The parts are
joined to one run, which appears atomically at the end.

Example:
    measure_until_decided(load, console, budget_s=1200).settings.looks      # 4: after 90, 180, 360 and 720 s
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from deepseek.spec import InputError
from loadtests.load.measure import START_S, ModelLoad, measure
from loadtests.results.run import Run, new_run, publish, runs_folder
from loadtests.results.settings import LoadSettings
from loadtests.slo.judge import judge
from loadtests.slo.judged_objectives import JudgedObjective

Row = dict[str, Any]


def planned_looks(settings: LoadSettings, budget_s: float) -> list[int]:
    """The length of the run at each look, in lengths of its first part; InputError if there is no time for one."""
    looks = [1]
    while _seconds(settings, looks[-1] * 2, len(looks) + 1) <= budget_s:
        looks.append(looks[-1] * 2)
    if (needed_s := _seconds(settings, 1, 1)) > budget_s:
        raise InputError(
            f"--max-s {budget_s:g}: a run of {settings.duration_s:g} s takes {needed_s:g} s with its start and "
            "warm-up; give at least that (BUDGET_S=), or a shorter --duration-s"
        )
    return looks


def _seconds(settings: LoadSettings, lengths: int, parts: int) -> float:
    return lengths * settings.duration_s + parts * (START_S + settings.warmup_s)


def measure_until_decided(load: ModelLoad, console: Console, *, budget_s: float) -> Run:
    """Measures part after part and saves them as one run."""
    looks = planned_looks(load.settings, budget_s)
    with new_run(runs_folder(load.settings.model)) as draft:
        parts: list[Path] = []
        for done, lengths in zip([0, *looks], looks, strict=False):
            part = longer(replace(load.settings, seed=load.settings.seed + len(parts)), lengths - done)
            try:
                made = measure(part, load.spec, load.served, console, draft.parent / "parts")
            except BaseException:
                if parts:  # they are one valid run, whose looks are recorded
                    (saved,) = publish(draft)
                    console.print(f"stopped; the parts before are saved: {saved}", soft_wrap=True)
                raise
            parts.append(made.folder)
            join(parts, draft, len(looks))
            run = Run.load(draft)
            judgement = judge(run, load.spec.slo)
            open_lines = [each.name for each in judgement.objectives if undecided(each)]
            if judgement.problems or not open_lines:
                break
            console.print(f"after {run.settings.duration_s:g} s: {', '.join(open_lines)} undecided", soft_wrap=True)
        (saved,) = publish(draft)
        return Run.load(saved)


def undecided(objective: JudgedObjective) -> bool:
    """Whether more requests may decide the objective. A rate that was not offered stays unknown."""
    return objective.status == "inconclusive" and objective.offered


def longer(settings: LoadSettings, times: int) -> LoadSettings:
    """The same load for several times its length."""
    shape = settings.shape and ", ".join([settings.shape] * times)
    return replace(settings, duration_s=settings.duration_s * times, shape=shape)


def join(parts: Sequence[Path], draft: Path, looks: int) -> None:
    """Writes the files of one run that consists of the runs in `parts`, one after the other."""
    heads: list[Row] = [json.loads((part / "run.json").read_text()) for part in parts]
    rows: list[Row] = []
    start_s = 0
    for part, head in zip(parts, heads, strict=True):
        # Of the parts between, the warm-up and the answers after the end would fall on another part's seconds.
        first = -math.inf if part is parts[0] else 0
        end = start_s + round(head["settings"]["duration_s"])
        last = math.inf if part is parts[-1] else end - start_s
        found = map(json.loads, (part / "seconds.jsonl").read_text().splitlines())
        rows += [{**row, "second": row["second"] + start_s} for row in found if first <= row["second"] < last]
        start_s = end
    shapes = [head["settings"]["shape"] for head in heads]
    counted = [head["server"]["statistics"] for head in heads]  # a part without them leaves the run without
    settings = {
        **heads[0]["settings"],
        "duration_s": float(start_s),
        "shape": ", ".join(shapes) if shapes[0] else None,
        "looks": looks,
    }
    joined = {
        **heads[0],
        "settings": settings,
        "generator": _worst([head["generator"] for head in heads]),
        "server": {**heads[-1]["server"], "statistics": _summed(counted) if all(counted) else {}},
        "lengths": [row for head in heads for row in head["lengths"]],
        "rows": len(rows),
    }
    (draft / "seconds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (draft / "run.json").write_text(json.dumps(joined, indent=2), encoding="utf-8")


def _worst(generators: Sequence[Row]) -> Row:
    """The health of the generator in its worst part; lost workers are added."""
    busiest = {name: max(each[name] for each in generators) for name in ("thread_cpu", "process_cpu", "machine_cpu")}
    busiest["workers_lost"] = sum(each["workers_lost"] for each in generators)
    return {**generators[0], **busiest, "precedence": all(each["precedence"] for each in generators)}


def _summed(statistics: Sequence[Any]) -> Any:
    """The sum of nested counters; lists keep each value once."""
    if isinstance(statistics[0], dict):
        names = list(dict.fromkeys(name for each in statistics for name in each))
        return {name: _summed([each[name] for each in statistics if name in each]) for name in names}
    if isinstance(statistics[0], list):
        return list(dict.fromkeys(value for each in statistics for value in each))
    return sum(statistics)
