"""How releases and rollbacks of a version ended, from their records in `build/<model>/releases/`.

Contract: reads only; `serving.release.journal` writes the records. An incomplete last line, left by a killed process,
is ignored.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.spec.command import InputError
from deepseek.spec.deployment import build_dir
from deepseek.spec.files.manifest import FileDigest, PublishedManifest
from deepseek.spec.files.repository import versions_of

JOURNAL, MANIFEST, WITHDRAWN = "journal.jsonl", "manifest.json", "withdrawn"


def releases_dir(model: str) -> Path:
    """The folder of a model's release history."""
    return build_dir(model) / "releases"


def record_folders(model: str) -> list[Path]:
    """The folders of all releases and rollbacks, newest first."""
    return sorted((path.parent for path in releases_dir(model).glob(f"[0-9]*/{JOURNAL}")), reverse=True)


def journal_lines(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a record's journal."""
    lines = []
    for text in (folder / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def manifest_of(folder: Path, before: int | None) -> PublishedManifest | None:
    """Manifest of the version that was released, or that a rollback from `before` withdrew; None if none was kept."""
    for path in (folder / MANIFEST, folder / WITHDRAWN / str(before) / MANIFEST):
        with suppress(InputError, OSError):
            return PublishedManifest.load(path)
    return None


def last_number(model: Path) -> int:
    """The highest version number that a repository's model ever had, so that no number is reused; 0 for none."""
    used, repository = [0, *versions_of(model)], str(model.parent.resolve())
    for folder in record_folders(model.name):
        head, *rest = journal_lines(folder) or [{}]
        if head.get("repository", repository) != repository:
            continue
        if head.get("kind") == "rollback" or any(line.get("step") == "switch" for line in rest):
            used += [head["version"], head.get("before") or 0]
    return max(used)


def last_rollback(model: str, repository: Path) -> str:
    """When the last finished rollback in a repository began; "" if there was none."""
    for folder in record_folders(model):
        head, *rest = journal_lines(folder) or [{}]
        if head.get("kind") != "rollback" or head.get("repository") != str(repository.resolve()):
            continue
        if any(line.get("outcome") == "rolled back" for line in rest):
            return str(head["at"])
    return ""


@dataclass(frozen=True, kw_only=True)
class Fate:
    """How a release or rollback of a version ended."""

    version: int
    outcome: str
    at: str
    folder: Path
    bad: bool
    """A gate failed, or the version was rolled back. False if a gate was inconclusive."""


def last_fate(model: str, files: Mapping[str, FileDigest], repository: Path) -> Fate | None:
    """The latest outcome for these files in a repository; unfinished releases and rollbacks are ignored."""
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
