"""The command `kubernetes`: writes an overlay over `kubernetes/` with limits computed for the models of a repository.

Contract: reads the same files as `deepseek stack`, computes the same limits, and uses `build/<model>/scale.json` of
`make simulate-scale` if it exists. Writes a folder for `kubectl apply -k`: hardware, memory, shared memory, grace
periods, the gateway's limits, the autoscaler's targets and bounds, alerts, and a load test for each model. With
--models-url it also packs the repository into `models.tar.gz`, which the user uploads there. It writes no secrets.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from deepseek.spec import InputError
from deepseek.spec.files.folders import write_whole
from deepseek.spec.files.read_env_file import gpu_stack_tag
from deepseek.spec.files.repository import CONFIG
from deepseek.spec.machine.triton_release import TRITON_TAG, check_tag
from serving.kubernetes.autoscaling import autoscaler_patch, metric_group, scale_of
from serving.kubernetes.loadtest_jobs import write_loadtest
from serving.kubernetes.manifests import (
    IMAGE_TAG,
    NAMESPACE,
    Overlay,
    alerts,
    gateway_patch,
    kustomization,
    triton_patch,
)
from serving.observe.alerts import ROLLOUT_MIN, as_yaml, rules
from serving.observe.recording_rules import Scope
from serving.repository.archive import pack
from serving.repository.checks import MANIFEST
from serving.repository.fetch import check_url
from serving.repository.served_models import MIB, ServedModel, served_models
from serving.stack.gateway_folder import gateway_folder
from serving.stack.gateway_limits import gateway_sizes, limits
from serving.stack.refresh import folders_of, source_of
from serving.stack.server_sizes import server_sizes

MINUTES_OF_POD = 2  # per pod of a rollout: to find a node and start


def _digest(repository: Path, models: Sequence[ServedModel]) -> str:
    """Digest of the served models: their configurations and manifests, which contain the files' digests."""
    found = hashlib.sha256()
    for model in models:
        folder = repository / model.name
        for path in (folder / CONFIG, *(folder / str(version) / MANIFEST for version in model.versions)):
            found.update(f"{path.relative_to(repository)}\n".encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()[:16]


def write(folder: Path, overlay: Overlay, models: list[ServedModel], runbook: str) -> None:
    """Writes all files of the overlay and removes those of an earlier one."""
    files = {
        "kustomization.yaml": kustomization(overlay),
        "triton.yaml": triton_patch(overlay),
        "gateway.yaml": gateway_patch(overlay),
        "limits.conf": limits(models),
    }
    if overlay.autoscaler != "none":
        files["autoscaler.yaml"] = autoscaler_patch(overlay.autoscaler, overlay.scale, NAMESPACE)
    if overlay.monitoring:
        rollout_min = max(ROLLOUT_MIN, MINUTES_OF_POD * overlay.scale.max_replicas)
        scope = Scope(NAMESPACE)
        groups = rules(models, runbook, scope, rollout_min)["groups"] + [metric_group(overlay.scale, models, scope)]
        files["alerts.yaml"] = alerts(as_yaml({"groups": groups}))
    for name, content in files.items():
        write_whole(folder / name, content)
    for name in {"autoscaler.yaml", "alerts.yaml"} - files.keys():
        (folder / name).unlink(missing_ok=True)


def _port_of(url: str) -> int:
    """The port of a URL, or its scheme's default; 0 if it is invalid."""
    try:
        found = urlsplit(url)
        return {"http": 80, "https": 443}.get(found.scheme, 0) if found.port is None else found.port
    except ValueError:
        return 0


def _check(options: argparse.Namespace) -> None:
    options.gateway = options.gateway or gateway_folder()
    options.models_port = _port_of(options.models_url)
    options.image_tag = options.image_tag or IMAGE_TAG
    options.triton_tag = check_tag(options.triton_tag or gpu_stack_tag(options.env_file) or TRITON_TAG)
    if not (options.base / "base" / "kustomization.yaml").is_file():
        raise InputError(f"--base {options.base}: no base/kustomization.yaml in it; give the folder kubernetes/")
    if options.models_url:
        check_url("--models-url", options.models_url)
    if options.models_url and not options.models_port:
        raise InputError(f"--models-url {options.models_url!r}: a port is a number from 1 to 65535")
    host_and_port = re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):\d+", options.loadtest_url)
    if not host_and_port or not _port_of(f"//{options.loadtest_url}"):
        raise InputError(f"--loadtest-url {options.loadtest_url!r}: it must be host:port, such as api.example.com:443")
    if options.no_monitoring and options.autoscaler != "none":
        raise InputError(
            f"--no-monitoring with --autoscaler {options.autoscaler}: the autoscaler needs monitoring's metrics; "
            "give --autoscaler none, or leave out --no-monitoring"
        )
    for name in ("registry", "image_tag", "triton_tag"):
        if not re.fullmatch(r"[A-Za-z0-9._:/-]*", given := getattr(options, name)) or "://" in given:
            raise InputError(f"--{name.replace('_', '-')} {given!r}: not valid in an image name")


def main(options: argparse.Namespace) -> None:
    _check(options)
    folder = options.output or options.build / "kubernetes"
    before = source_of(options.repository, options.gateway)
    models = served_models(options.repository, options.models, folders_of(before))
    folder.mkdir(parents=True, exist_ok=True)
    sha256, models_mib = "", 0
    if options.models_url:
        sha256, size_bytes = pack(options.repository, folder / "models.tar.gz")
        models_mib = math.ceil((size_bytes + (folder / "models.tar.gz").stat().st_size) / MIB * 1.1) + 16  # blocks
    scale, notes = scale_of(models, options.build)
    overlay = Overlay(
        base=os.path.relpath(options.base.resolve(), folder.resolve()),
        on_gpu=any(model.needs_gpu for model in models),
        sizes=server_sizes(models),
        gateway=gateway_sizes(models),
        scale=scale,
        autoscaler=options.autoscaler,
        registry=options.registry,
        image_tag=options.image_tag,
        triton_tag=options.triton_tag,
        models_url=options.models_url,
        models_port=options.models_port,
        models_sha256=sha256,
        models_mib=models_mib,
        models_digest=_digest(options.repository, models),
        load_balancer=options.load_balancer,
        monitoring=not options.no_monitoring,
    )
    write(folder, overlay, models, options.runbook)
    notes = notes if overlay.autoscaler != "none" else []
    notes += filter(
        None, (write_loadtest(folder / "loadtest" / model.name, overlay, model, options) for model in models)
    )
    if options.json:
        print(json.dumps(asdict(overlay) | {"scale": overlay.scale.model_dump()}, indent=2))
    else:
        _tell(folder, overlay, models, notes)


def _tell(folder: Path, overlay: Overlay, models: Sequence[ServedModel], notes: Sequence[str]) -> None:
    names = ", ".join(model.name for model in models)
    scale, kind = overlay.scale, "a GPU" if overlay.on_gpu else f"{overlay.scale.cores} cores"
    targets = ", ".join(f"{target.metric} {target.value:g}" for target in scale.targets)
    bounds = f"{scale.min_replicas} to {scale.max_replicas} pods, {targets}" if overlay.autoscaler != "none" else "no"
    print(f"overlay   {folder}: {names}; {kind} and {overlay.sizes.memory_mib} MiB a pod; autoscaler: {bounds}")
    if overlay.models_url:
        print(f"models    put {folder / 'models.tar.gz'} at {overlay.models_url}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
