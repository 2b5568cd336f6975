"""What became of a version's files, by the records that releases and rollbacks leave in `build/<model>/releases/`.

Contract: reads only; `serving.releases` writes the records. A line that a kill cut off is left out.

Example:
    fate = last_fate("shop", manifest.files, Path("model_repository"))
    fate.outcome        # "refused"; fate is None where no record is about these files
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.spec.command import InputError
from deepseek.spec.deployment import build_dir
from deepseek.spec.manifest import FileDigest, PublishedManifest

JOURNAL, MANIFEST, WITHDRAWN = "journal.jsonl", "manifest.json", "withdrawn"


def releases_dir(model: str) -> Path:
    """Where the history of a model lies."""
    return build_dir(model) / "releases"


def record_folders(model: str) -> list[Path]:
    """Of all releases and rollbacks, newest first."""
    return sorted((path.parent for path in releases_dir(model).glob(f"[0-9]*/{JOURNAL}")), reverse=True)


def journal_lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a record's journal."""
    lines = []
    for text in (folder / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def manifest_of(folder: Path, before: int | None) -> PublishedManifest | None:
    """Of the version that was released, or that a rollback from `before` took out; None where none was kept."""
    for path in (folder / MANIFEST, folder / WITHDRAWN / str(before) / MANIFEST):
        with suppress(InputError, OSError):
            return PublishedManifest.load(path)
    return None


@dataclass(frozen=True, kw_only=True)
class Fate:
    """How a release or rollback of a version ended."""

    version: int
    outcome: str
    at: str
    folder: Path
    bad: bool
    """A gate failed, or it was rolled back; not where a gate could not tell."""


def last_fate(model: str, files: Mapping[str, FileDigest], repository: Path) -> Fate | None:
    """The latest that was decided about these files in a repository; what was not ended decides nothing."""
    for folder in record_folders(model):
        head, *rest = journal_lines(folder) or [{}]
        outcome = next((line["outcome"] for line in reversed(rest) if "outcome" in line), None)
        if outcome is None or head.get("repository") != str(repository.resolve()):
            continue
        manifest = manifest_of(folder, head.get("before"))
        if manifest is not None and manifest.files == files:
            version = head["before"] if head["kind"] == "rollback" else head["version"]
            failed = outcome == "refused" and any(line.get("state") == "failed" for line in rest)
            bad = failed or outcome == "rolled back"
            return Fate(version=version, outcome=outcome, at=head["at"], folder=folder, bad=bad)
    return None
