"""The journal of a release or rollback: each step is on the disk before the next begins.

Contract: one folder per release or rollback under `build/<model>/releases/`, with `journal.jsonl`, one line per start
and end of a step: after a kill it shows which step did not finish. On a full disk only taking a version out of service
continues without a journal. Beside it are the steps' results (`doctor.json`, `parity.json`, `shadow.json`,
`objectives.json`, `switch.json`), the `manifest.json` of the released or withdrawn version, and at the end `report.md`.
Only one release or rollback of a model runs at a time. `serving.release.history` reads the journal.
"""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from deepseek.spec.files.folders import alone_in, time_name, write_whole
from deepseek.spec.files.released import JOURNAL, WITHDRAWN, releases_dir
from serving.release.versions import move_out
from serving.repository.checks import MANIFEST

State = Literal["started", "holds", "failed", "inconclusive", "wrong input", "interrupted", "left out"]
Outcome = Literal["live", "in the repository", "refused", "rolled back", "not finished"]


@contextmanager
def exclusive(model: str) -> Iterator[Path]:
    """Locks and returns the folder of the releases; the lock ends with its process, even if that is killed.

    Raises InputError if another process has it.
    """
    folder = releases_dir(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a rollback works without it; a release fails when it begins its journal
        yield folder
        return
    with alone_in(folder, refusal=f"another release or rollback of {model} is under way in {folder}; wait for it"):
        yield folder


class ReleaseJournal:
    """The journal of one release or rollback, in its own folder; `may_fail` continues if it cannot be written."""

    def __init__(
        self,
        releases: Path,
        kind: Literal["release", "rollback"],
        version: int,
        *,
        may_fail: bool = False,
        **facts: Any,
    ) -> None:
        self.folder = releases / f"{time_name(releases)}-{kind}-{version}"
        self.may_fail = may_fail
        self.lines: list[dict[str, Any]] = []
        self._warned = False
        self.write(kind=kind, version=version, **facts)

    def write(self, **line: Any) -> None:
        """Adds a line, which is on the disk when this returns."""
        line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}
        self.lines.append(line)

        def append() -> None:
            with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

        self._on_disk(append)

    def keep(self, name: str, content: object) -> None:
        """Writes a step's result to a file beside the journal."""
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
                print(f"warning: {self.folder}: {error.strerror}; the record is incomplete", file=sys.stderr)
            self._warned = True

    def withdraw(self, model: Path, number: int, *, back_to: int, outcome: Outcome) -> None:
        """Moves a version out of the repository into this folder; from here on a full disk stops nothing.

        The manifest is written first, and the outcome as soon as no server sees the version, so that both survive a
        kill.
        """
        self.may_fail = True
        with suppress(OSError):
            self.keep(MANIFEST, (model / str(number) / MANIFEST).read_text(errors="replace"))
        archive = self.folder / WITHDRAWN
        decided = functools.partial(self.write, outcome=outcome)
        for said in move_out(model, number, back_to=back_to, archive=archive, decided=decided):
            self.write(step="withdrawn", state="left out", said=said)
            print(f"note: {said}", file=sys.stderr)
