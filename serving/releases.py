"""What every release and rollback of a model did, as it did it; and the history of its versions.

Contract: a folder each under `build/<model>/releases/`, with `journal.jsonl`, a line a step, on the disk before the
step goes on: after a kill it says which step was not ended. Only taking a version out goes on where the disk has no
room for it. Beside it lie what the steps found (`doctor.json`, `parity.json`, `shadow.json`, `objectives.json`,
`switch.json`), the `manifest.json` of the version that was released, or taken out, and, at the end, `report.md`. One
release or rollback of a model at a time.

Examples:
    python -m serving.releases --model recommender              # the history, newest first
    python -m serving.releases --model recommender --json
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    Parser,
    PublishedManifest,
    add_model_arguments,
    run_command,
)
from deepseek.spec.folders import write_whole
from deepseek.spec.released import JOURNAL, WITHDRAWN, journal_lines, manifest_of, record_folders, releases_dir
from serving.keys import gateway_folder
from serving.repository import MANIFEST
from serving.stack import observe_folder, refresh
from serving.versions import newest, take_out

REPORT = "report.md"
State = Literal["started", "holds", "failed", "inconclusive", "wrong input", "interrupted", "left out"]
Outcome = Literal["live", "in the repository", "refused", "rolled back", "not finished", "under way"]


@contextmanager
def alone(model: str) -> Iterator[Path]:
    """The folder of the releases, for one process at a time; the lock ends with its process, however that ends."""
    folder = releases_dir(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a rollback does without; a release says so when it begins its journal
        yield folder
        return
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another release or rollback of {model} is under way in {folder}; wait for it") from None
        yield folder
    finally:
        os.close(lock)


def _in_use(folder: Path) -> bool:
    """Whether a release or rollback is under way there."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


class Journal:
    """One release's or rollback's, in a folder of its own; with `may_fail` it goes on where nothing can be written."""

    def __init__(
        self,
        releases: Path,
        kind: Literal["release", "rollback"],
        version: int,
        *,
        may_fail: bool = False,
        **facts: Any,
    ) -> None:
        now = datetime.now(UTC)
        name = f"{now:%Y-%m-%dT%H-%M-%S}.{now.microsecond // 1000:03}Z-{kind}-{version}"
        self.folder = releases / name
        self.may_fail = may_fail
        self.lines: list[dict[str, Any]] = []
        self._warned = False
        self.write(kind=kind, version=version, **facts)

    def write(self, **line: Any) -> None:
        """A line, on the disk when it returns."""
        line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}
        self.lines.append(line)

        def append() -> None:
            with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

        self._on_disk(append)

    def keep(self, name: str, content: object) -> None:
        """What a step found, as a file beside the journal."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        self._on_disk(lambda: write_whole(self.folder / name, text))

    def _on_disk(self, write: Callable[[], object]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            if not self.may_fail:
                raise
            if not self._warned:
                print(f"warning: {self.folder}: {error.strerror}; the record is not whole", file=sys.stderr)
            self._warned = True

    def withdraw(self, model: Path, number: int, *, back_to: int, outcome: Outcome) -> None:
        """Takes a version out of the repository into this folder; from here on no full disk stops anything.

        Its manifest is here before, and the outcome as soon as no server sees it: a kill after that changes neither.
        """
        self.may_fail = True
        with suppress(OSError):
            self.keep(MANIFEST, (model / str(number) / MANIFEST).read_text(errors="replace"))
        archive = self.folder / WITHDRAWN
        decided = functools.partial(self.write, outcome=outcome)
        for said in take_out(model, number, back_to=back_to, archive=archive, decided=decided):
            self.write(step="withdrawn", state="left out", said=said)
            print(f"note: {said}", file=sys.stderr)


class LeftOut(str):
    """Why a step was not done."""


class Steps:
    """Does one thing after the other, each in the journal before and after, and in a line for people."""

    def __init__(self, journal: Journal, *, as_json: bool) -> None:
        self.journal = journal
        self._people = sys.stderr if as_json else sys.stdout

    def do(self, name: str, step: Callable[[], str]) -> None:
        """One step; its outcome in a line."""
        self.journal.write(step=name, state="started")
        began_s = time.monotonic()

        def ended(state: State, said: str) -> None:
            seconds = round(time.monotonic() - began_s, 1)
            self.journal.write(step=name, state=state, said=said, seconds=seconds)
            print(f"{name:<11} {state:<9} {seconds:>6.1f} s  {said}", file=self._people, flush=True)

        try:
            said = step()
        except (GateFailed, InvalidMeasurement, InputError, KeyboardInterrupt) as error:
            states: dict[type[BaseException], State] = {GateFailed: "failed", InvalidMeasurement: "inconclusive"}
            states |= {InputError: "wrong input", KeyboardInterrupt: "interrupted"}
            ended(states[type(error)], str(error))
            raise
        ended("left out" if isinstance(said, LeftOut) else "holds", said)


def expect_anew(repository: Path) -> str:
    """Has the alerts of the stack over `repository` expect what it serves now; a failure says what to do, and no more.

    What was released is released: rules that went by it are a ticket after ten minutes, not a reason to go back.
    """
    folder = gateway_folder()
    try:
        lacking = refresh(repository, folder)
    except (OSError, ValueError) as error:
        return LeftOut(f"the alerts still expect what was served before: {error}; then: make stack")
    if lacking is None:
        return LeftOut("no stack was made for this repository")
    said = f"alerts, dashboard and limits are those of what the repository has now: {observe_folder(folder)}"
    few = f"; its containers have too little for it ({', '.join(lacking)}): make stack && docker compose up -d"
    return said + (few if lacking else "")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a release, as its last line has it."""

    name: str
    state: State
    said: str = ""
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A release or rollback, read back."""

    folder: str
    kind: Literal["release", "rollback"]
    version: int
    before: int | None
    """What was served when it began."""
    started: str
    steps: tuple[Step, ...]
    outcome: Outcome
    precision: str = ""

    @property
    def stopped_in(self) -> Step | None:
        """The step that decided against it, or that was not ended."""
        bad = ("started", "failed", "inconclusive", "wrong input", "interrupted")
        return next((step for step in self.steps if step.state in bad), None)

    def plain(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def read(folder: Path, *, under_way: bool = False) -> Record | None:
    """What a journal says; None where it has no whole line. A line that a kill cut off is left out."""
    lines = journal_lines(folder)
    return _record(folder, lines, under_way=under_way) if lines else None


def _record(folder: Path, lines: list[dict[str, Any]], *, under_way: bool = False) -> Record:
    steps: dict[str, Step] = {}
    outcome: Outcome = "under way" if under_way else "not finished"
    for line in lines[1:]:
        if "outcome" in line:
            outcome = line["outcome"]
        else:
            facts = {name: line[name] for name in ("said", "seconds") if name in line}
            steps[line["step"]] = Step(name=line["step"], state=line["state"], **facts)
    head = lines[0]
    manifest = manifest_of(folder, None) if head["kind"] == "release" else None
    return Record(
        folder=str(folder),
        kind=head["kind"],
        version=head["version"],
        before=head.get("before"),
        started=head["at"],
        steps=tuple(steps.values()),
        outcome=outcome,
        precision=manifest.precision if manifest else "",
    )


def history(model: str) -> list[Record]:
    """All that was done, newest first."""
    folders = record_folders(model)
    busy = bool(folders) and _in_use(releases_dir(model))
    found = (read(each, under_way=busy and each == folders[0]) for each in folders)
    return [record for record in found if record is not None]


def last_number(model: str, repository_model: Path) -> int:
    """The highest number that a version in the repository ever had: none is served twice for two versions."""
    used = [newest(repository_model) or 0]
    for record in history(model):
        if record.kind == "rollback" or any(step.name == "switch" for step in record.steps):
            used += [record.version, record.before or 0]
    return max(used)


def rolled_back(model: str, manifest: PublishedManifest) -> Record | None:
    """The last rollback that took out a version of the same files: who releases it again is to know."""
    for record in history(model):
        out = manifest_of(Path(record.folder), record.before) if record.kind == "rollback" else None
        if out is not None and out.files == manifest.files:
            return record
    return None


def report(record: Record, model: str) -> str:
    """The page for people: what was done, and what decided."""
    decided = record.stopped_in
    lines = [
        f"# {model}: {record.kind} of version {record.version}: {record.outcome}",
        "",
        f"Begun {record.started}; served before: {'nothing' if record.before is None else f'version {record.before}'}."
        + (f" Stopped in {decided.name}: {decided.said or decided.state}." if decided else ""),
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


def finish(journal: Journal, model: str, *, as_json: bool) -> None:
    """The report, and where it is."""
    record = _record(journal.folder, journal.lines)
    journal.keep(REPORT, report(record, model))
    if as_json:
        print(json.dumps(record.plain()))
    else:
        print(f"{record.outcome}: {journal.folder / REPORT}", flush=True)


def _show(records: list[Record], model: str, repository: Path) -> None:
    table = Table("begun", "", "version", "precision", "outcome", "stopped in", box=box.SIMPLE_HEAD)
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
        print(f"each with its journal, manifest and {REPORT}: {releases_dir(model)}")


def main() -> None:
    """Lists the history of a model."""
    parser = Parser(__doc__, prog="python -m serving.releases")
    add_model_arguments(parser)
    parser.add_argument("--repository", default="model_repository", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    args = parser.parse_args()
    records = history(args.model)
    if not records:
        DeploymentSpec.of_model(args.model, args.models)  # a name that is no model's is an error
    if args.json:
        there = newest(Path(args.repository) / args.model)
        print(
            json.dumps({"model": args.model, "newest": there, "releases": [each.plain() for each in records]}, indent=2)
        )
    else:
        _show(records, args.model, Path(args.repository))


if __name__ == "__main__":
    run_command(main)
