"""The command `releases`: lists a model's releases and rollbacks from their journals, and writes the report of one.

Contract: reads only, except `finish`, which writes a report beside the journal.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import DeploymentSpec
from deepseek.spec.files.released import journal_lines, manifest_of, record_folders, releases_dir
from serving.release.journal import Outcome, ReleaseJournal, State
from serving.release.versions import newest

REPORT = "report.md"


@dataclass(frozen=True, kw_only=True)
class ReleaseStep:
    """One step of a release, from its last line in the journal."""

    name: str
    state: State
    said: str = ""
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseRecord:
    """A release or rollback, read from its journal."""

    folder: str
    kind: Literal["release", "rollback"]
    version: int
    before: int | None
    """The version served when it began."""
    started: str
    steps: tuple[ReleaseStep, ...]
    outcome: Outcome
    precision: str = ""

    @property
    def stopped_in(self) -> ReleaseStep | None:
        """The step that failed or did not finish."""
        bad = ("started", "failed", "inconclusive", "wrong input", "interrupted")
        return next((step for step in self.steps if step.state in bad), None)


def read(folder: Path) -> ReleaseRecord | None:
    """Reads a journal; None if it has no complete line. Ignores a line that a kill cut off."""
    lines = journal_lines(folder)
    return _record(folder, lines) if lines else None


def _record(folder: Path, lines: list[dict[str, Any]]) -> ReleaseRecord:
    steps: dict[str, ReleaseStep] = {}
    outcome: Outcome = "not finished"
    for line in lines[1:]:
        if "outcome" in line:
            outcome = line["outcome"]
        else:
            facts = {name: line[name] for name in ("said", "seconds") if name in line}
            steps[line["step"]] = ReleaseStep(name=line["step"], state=line["state"], **facts)
    head = lines[0]
    manifest = manifest_of(folder, None) if head["kind"] == "release" else None
    return ReleaseRecord(
        folder=str(folder),
        kind=head["kind"],
        version=head["version"],
        before=head.get("before"),
        started=head["at"],
        steps=tuple(steps.values()),
        outcome=outcome,
        precision=manifest.precision if manifest else "",
    )


def history(model: str) -> list[ReleaseRecord]:
    found = (read(each) for each in record_folders(model))
    return [record for record in found if record is not None]


def report(record: ReleaseRecord, model: str) -> str:
    """The report in Markdown: the steps, and which one decided."""
    decided = record.stopped_in
    lines = [
        f"# {model}: {record.kind} of version {record.version}: {record.outcome}",
        "",
        f"Started {record.started}; served before: {'nothing' if record.before is None else f'version {record.before}'}"
        + (f". Stopped in {decided.name}: {decided.said or decided.state}." if decided else "."),
        "",
        "| step | | seconds | |",
        "|---|---|--:|---|",
    ]
    for step in record.steps:
        seconds = "" if step.seconds is None else f"{step.seconds:.1f}"
        state = step.state if step.state in ("holds", "left out") else f"**{step.state}**"
        said = step.said.replace("|", r"\|")
        lines.append(f"| {step.name} | {state} | {seconds} | {said} |")
    return "\n".join(lines) + "\n"


def finish(journal: ReleaseJournal, model: str, *, as_json: bool) -> None:
    record = _record(journal.folder, journal.lines)
    journal.keep(REPORT, report(record, model))
    if as_json:
        print(json.dumps(asdict(record)))
    else:
        print(f"{record.outcome}: {journal.folder / REPORT}", flush=True)


def _show(records: list[ReleaseRecord], model: str, repository: Path) -> None:
    table = Table("started", "", "version", "precision", "outcome", "stopped in", box=box.SIMPLE_HEAD)
    for record in records:
        decided = record.stopped_in
        why = "" if decided is None else f"{decided.name}: {decided.said or decided.state}"
        version = str(record.version)
        if record.kind == "rollback":
            version = f"{record.before} -> {record.version}"
        began = record.started[:19].replace("T", " ")
        table.add_row(began, record.kind, version, record.precision, record.outcome, why)
    Console(width=max(Console().width, 120), markup=False).print(table)
    there = newest(repository / model)
    print(f"{repository / model}: {'no version' if there is None else f'version {there} is the newest'}")
    if records:
        print(f"journal, manifest and {REPORT} of each: {releases_dir(model)}")


def main(options: argparse.Namespace) -> None:
    records = history(options.model)
    if not records:
        DeploymentSpec.of_model(options.model, options.models)  # raises for an unknown model
    if options.json:
        there = newest(options.repository / options.model)
        found = {"model": options.model, "newest": there, "releases": [asdict(each) for each in records]}
        print(json.dumps(found, indent=2))
    else:
        _show(records, options.model, options.repository)
