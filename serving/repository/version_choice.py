"""Chooses the versions of a model to serve: the newest intact one, with its configuration.

Contract: reads a model folder that `export.stages.publish` made. A version that does not fit its configuration counts
as damaged. The embedded server serves this choice.
"""

from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import InputError
from deepseek.spec.files.repository import config_path, versions_of
from serving.repository.checks import (
    Finding,
    check_version,
    mismatch,
    publish_again,
    read_config,
    wanted_versions,
)
from serving.repository.config_checks import check_config


@dataclass(frozen=True, kw_only=True)
class VersionChoice:
    """The versions of a model to serve, and what is wrong with the others."""

    config: Path | None = None
    """None: no version can be served."""
    versions: tuple[int, ...] = ()
    """Newest first."""
    findings: tuple[Finding, ...] = ()


def choose_versions(model: Path) -> VersionChoice:
    """The newest intact version, the others that its version policy serves, and its configuration."""
    versions = versions_of(model)
    findings: list[Finding] = []
    for number in versions:
        path = config_path(model, number)
        config, wrong = check_under(model, number, path)
        findings += wrong
        if config is not None:
            served = [number]
            for other in wanted_versions(config, versions[versions.index(number) :])[1:]:
                _, wrong = check_under(model, other, path)
                findings += wrong
                served += [] if wrong else [other]
            return VersionChoice(config=path, versions=tuple(served), findings=tuple(findings))
    return VersionChoice(findings=tuple(findings))


def check_under(model: Path, number: int, path: Path) -> tuple[ModelConfig | None, list[Finding]]:
    """The configuration at `path`; None and the reasons if the version cannot be served with it."""
    manifest, wrong = check_version(model, number)
    if manifest is None or wrong:
        return None, wrong
    try:
        config = read_config(path)
    except InputError as error:
        where = f"{model.name}/{path.relative_to(model)}"
        return None, [mismatch(where, str(error), publish_again(model))]
    wrong = check_config(model, config, manifest)
    if number not in wanted_versions(config, [number]):
        where = f"{model.name}/{number}"
        wrong.append(mismatch(where, "version_policy in its config.pbtxt leaves it out", publish_again(model)))
    return (None, wrong) if wrong else (config, [])
