"""The files that a running stack reloads: limits, rules, dashboard.

Contract: `make stack` writes them and records their sources in `stack.json`; `refresh` rewrites them after a release or
rollback. Prometheus and Grafana can read their files under any umask.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek.spec.files.folders import alone_in, beside, write_whole
from serving.observe.alerts import RUNBOOK, as_yaml, rules
from serving.observe.dashboard import dashboard
from serving.repository.served_models import ServedModel, served_models
from serving.stack.gateway_folder import observe_folder, source_file
from serving.stack.gateway_limits import limits

OBSERVE = Path(__file__).parents[2] / "docker" / "observe"


def refresh(repository: Path, folder: Path) -> bool:
    """Rewrites limits, rules and dashboard for a changed `repository`; False if it has no stack.

    Gateway and Prometheus reload them. Unchanged limits are not written, so that the gateway does not start new workers
    under load.
    """
    source = source_of(repository, folder)
    if not source:
        return False
    with alone_in(folder):
        models = served_models(repository, Path(source["models"]), folders_of(source))
        if (folder / "limits.conf").read_text() != limits(models):
            write_limits(models, folder)
        write_observed(models, observe_folder(folder), source["runbook"])
    return True


def folders_of(source: Mapping[str, Any]) -> dict[str, Path]:
    """Where each model's `deploy.toml` was at the last `make stack` for the repository."""
    return {name: Path(place) for name, place in source.get("folders", {}).items()}


def source_of(repository: Path, folder: Path) -> dict[str, Any]:
    """The recorded sources of a repository's stack; empty if it has none."""
    path = source_file(folder)
    source: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return source if source.get("repository") == str(repository.resolve()) else {}


def write_limits(models: list[ServedModel], folder: Path) -> None:
    write_whole(folder / "limits.conf", limits(models))
    (folder / "limits.conf").chmod(0o644)  # if root writes it, the gateway is another user


def write_observed(models: list[ServedModel], folder: Path, runbook: str = RUNBOOK) -> None:
    """Rules and dashboard, readable by everyone: Prometheus and Grafana run as other users."""
    for part, content in (
        ("rules/deepseek.yml", as_yaml(rules(models, runbook))),
        ("dashboards/deepseek.json", json.dumps(dashboard(models), indent=2)),
    ):
        write_whole(folder / part, content)
        (folder / part).chmod(0o644)
        (folder / part).parent.chmod(0o755)


def write_settings(folder: Path) -> None:
    """Copies `docker/observe` for those programs, readable by everyone."""
    for path in OBSERVE.rglob("*.*"):
        if not path.name.startswith("."):  # as an editor's
            with beside(copy := folder / path.relative_to(OBSERVE)) as draft:
                draft.write_bytes(path.read_bytes())
            copy.chmod(0o644)
            for above in (each for each in copy.parents if folder in each.parents):
                above.chmod(0o755)
