"""Examines a model repository on a machine: which engines it would serve, and what is wrong with them.

Contract: reads each served version's `manifest.json` and files, and `config.pbtxt`; changes nothing.
"""

from dataclasses import replace
from pathlib import Path

from deepseek.spec import InputError
from deepseek.spec.files.repository import CONFIG, ENGINE, config_path, versions_of
from serving.doctor.engine_checks import ServedEngine, check_engine
from serving.doctor.machine import Machine
from serving.doctor.machine_checks import machine_findings
from serving.repository.checks import (
    Finding,
    check_layout,
    check_version,
    engine_config,
    made_here,
    mismatch,
    models_in,
    not_ours,
    publish_again,
    read_config,
    wanted_versions,
)
from serving.repository.config_checks import check_config


def examine(
    repository: Path, machine: Machine, *, model: str | None = None, kept: bool = True
) -> tuple[list[ServedEngine], list[Finding]]:
    """The engines that would be served, and all findings, mismatches first; `kept` also checks older versions.

    Raises InputError if the repository has no model, or not the `model` that was named.
    """
    models = models_in(repository)
    if model is not None:
        chosen = [path for path in models if path.name == model]
        if not chosen:
            raise InputError(f"no model {model!r} in {repository}; it has {', '.join(path.name for path in models)}")
        models = chosen
    engines: list[ServedEngine] = []
    findings = check_layout(repository)
    for path in models:
        if not made_here(path) and versions_of(path):
            findings.append(not_ours(path))
            continue
        more, found = _examine_model(path, machine, kept)
        engines += more
        findings += found
    findings += machine_findings(machine, engines)
    return engines, sorted(findings, key=lambda finding: finding.level)  # mismatches first


def _examine_model(model: Path, machine: Machine, kept: bool) -> tuple[list[ServedEngine], list[Finding]]:
    """Checks one model: each served version with its configuration, on the machine."""
    versions = versions_of(model)
    if not versions:
        return [], [mismatch(model.name, "has no version directory, so Triton fails to start", publish_again(model))]
    try:
        config = read_config(config_path(model, versions[0]))
        if config.backend != "python" or ENGINE in config.parameters:  # NVIDIA's Triton reads the repository itself
            config = read_config(model / CONFIG)
    except InputError as error:
        return [], [mismatch(f"{model.name}/{CONFIG}", str(error), publish_again(model, error))]
    engines: list[ServedEngine] = []
    findings: list[Finding] = []
    served = wanted_versions(config, versions)
    if not served:
        what = f"its version_policy names no version that is here ({', '.join(map(str, versions))}): nothing is served"
        findings.append(mismatch(f"{model.name}/{CONFIG}", what, publish_again(model)))
    for version in served:
        manifest, wrong = check_version(model, version)
        findings += wrong
        if manifest is None:
            continue
        findings += [each for each in check_config(model, config, manifest) if each not in findings]
        try:
            own = engine_config(model, version, config)
        except InputError as error:
            findings.append(mismatch(f"{model.name}/{version}", str(error), publish_again(model)))
            continue
        engine = ServedEngine(model=model.name, version=version, manifest=manifest, config=own, public=config)
        engines.append(engine)
        findings += check_engine(engine, machine)
    for version in versions if kept else ():
        if version not in served:  # not served, but a rollback may need it
            fix = f"no rollback goes to it; it may be removed: rm -r '{model / str(version)}'"
            findings += [replace(each, level="warning", fix=fix) for each in check_version(model, version)[1]]
    return engines, findings
