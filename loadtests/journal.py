"""What a search for better settings has measured so far, kept on disk as it is measured.

Contract: a line of JSON each, flushed before the search goes on. A search for the same thing (model, engine, SLO,
machine, versions, ways of measuring) takes up what is there; one for another starts anew, as where another version of
this code wrote the lines. A last line that was cut off by a kill is left out.

Example:
    journal = Journal(path, facts)
    journal.add(tried)
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loadtests.tuning import Pair, Setting, TriedSetting


class Journal:
    """One search's; `changed` names the facts by which an earlier one was about something else."""

    def __init__(self, path: Path, facts: dict[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.tried: dict[Setting, TriedSetting] = {}
        self.pairs: dict[Setting, list[Pair]] = {}
        """By the setting that the default was compared with."""
        self.reference_rps: float | None = None
        self.machine: dict[str, Any] = {}
        self.changed: list[str] = []
        lines = [] if fresh else _lines(path)
        facts = json.loads(json.dumps(facts))  # as it is read back
        if lines and (earlier := lines[0].get("facts")) is not None:
            self.changed = sorted(name for name in facts | earlier if facts.get(name) != earlier.get(name))
        if not (lines and "facts" in lines[0] and not self.changed and self._taken(lines)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._write({"facts": facts, "started": self.started})
        self.resumed = len(self.tried)

    def _taken(self, lines: list[dict[str, Any]]) -> bool:
        """Takes up an earlier search; False, and nothing, where another version of this module wrote it."""
        try:
            started = lines[0]["started"]
            for line in lines[1:]:
                self._take(line)
        except (ValidationError, KeyError, TypeError):
            self.tried, self.pairs, self.reference_rps, self.machine = {}, {}, None, {}
            self.changed = ["version of make tune"]
            return False
        self.started = started
        return True

    def _take(self, line: dict[str, Any]) -> None:
        if "tried" in line:
            tried = TriedSetting.model_validate(line["tried"])
            self.tried[tried.settings] = tried
        elif "pair" in line:
            setting = Setting.model_validate(line["of"])
            self.pairs.setdefault(setting, []).append(Pair.model_validate(line["pair"]))
        else:
            self.reference_rps, self.machine = line["reference_rps"], line["machine"]

    def add(self, tried: TriedSetting) -> None:
        """A setting was measured."""
        self.tried[tried.settings] = tried
        self._write({"tried": tried.model_dump()})

    def add_pair(self, setting: Setting, pair: Pair) -> None:
        """The default was compared with a setting once more."""
        self.pairs.setdefault(setting, []).append(pair)
        self._write({"of": setting.model_dump(), "pair": pair.model_dump()})

    def set_reference(self, rate_rps: float, machine: dict[str, Any]) -> None:
        """The rate at which latencies are compared, and where all is measured."""
        self.reference_rps, self.machine = rate_rps, machine
        self._write({"reference_rps": rate_rps, "machine": machine})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; what a kill left of a last one is cut off the file, too."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        return []
