"""What Kubernetes needs to serve a repository: an overlay over `kubernetes/` with limits computed for its models.

Contract: reads what `serving.stack` reads, by the same sums, and `build/<model>/scale.json` of `make simulate-scale`
where there is one; writes a folder for `kubectl apply -k`: hardware by what was built, memory, shared memory, grace
periods, the gateway's limits, the autoscaler's target and bounds, alerts, and for each model a load test. With
--models-url it also packs the repository into `models.tar.gz`, which is to be put there. Secrets are not written.

Examples:
    python -m serving.kubernetes                                # -> build/kubernetes/
    python -m serving.kubernetes --registry registry.example.com/shop --image-tag 1.4.0 --autoscaler keda
    python -m serving.kubernetes --models-url https://models.example.com/shop/models.tar.gz --json
"""

from __future__ import annotations

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

import numpy as np

from deepseek.spec import InputError, Parser, run_command
from deepseek.spec.folders import beside, write_whole
from deepseek.spec.repository import CONFIG
from deepseek.spec.triton_release import TRITON_TAG
from serving.alerts import ROLLOUT_MIN, RUNBOOK, as_yaml, rules
from serving.certificate import is_signed_by
from serving.keys import gateway_folder
from serving.manifests import (
    DEFAULT_CORES,
    DEFAULT_SCALE,
    GATEWAY_URL,
    IMAGE_TAG,
    NAMESPACE,
    LoadTest,
    Overlay,
    Scale,
    alerts,
    autoscaler_patch,
    gateway_patch,
    kustomization,
    load_group,
    loadtest_kustomization,
    together,
    triton_patch,
)
from serving.packed import pack
from serving.recording_rules import Scope
from serving.repository import MANIFEST
from serving.served import MIB, Served, served_models
from serving.stack import gateway_sizes, limits, other_folders, sizes

MINUTES_OF_POD = 2  # of a rollout, which goes pod by pod: a start, and that a node is found for it
CONFIG_MAP_BYTES = 900_000  # a ConfigMap holds 1 MiB, its other entries included; kubectl apply --server-side


def _digest(repository: Path, models: Sequence[Served]) -> str:
    """Of what is served: each model's configuration, and its versions' manifests, which have the files' digests."""
    found = hashlib.sha256()
    for model in models:
        folder = repository / model.name
        for path in (folder / CONFIG, *(folder / str(version) / MANIFEST for version in model.versions)):
            found.update(f"{path.relative_to(repository)}\n".encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()[:16]


def _scale_of(models: Sequence[Served], build: Path) -> tuple[Scale, list[str]]:
    """What was chosen for the models together, and what is to be said of that."""
    paths = {model.name: path for model in models if (path := build / model.name / "scale.json").is_file()}
    notes, chosen = [], {}
    for model in (each for each in models if each.name in paths):
        path, scale = paths[model.name], Scale.load(paths[model.name])
        if scale is None:
            notes.append(
                f"{path}: no setting held, so the autoscaler has no target of it; scale.html beside it shows the "
                "nearest"
            )
        elif scale.measured and scale.measured != (model.target, model.precision):
            notes.append(
                f"{path}: measured on {' '.join(scale.measured)}, served is {model.target} {model.precision}, so the "
                f"autoscaler has its default target, from {scale.min_replicas} to {scale.max_replicas} pods as before; "
                "measure this one: make capacity simulate-scale"
            )
            chosen[model.name] = scale.model_copy(update={"targets": DEFAULT_SCALE.targets, "rates": {}})
        else:
            chosen[model.name] = scale
    missing = [model.name for model in models if model.name not in paths]
    if not paths:
        notes.append("the autoscaler has its default target; make capacity simulate-scale chooses one")
    elif missing:
        notes.append(
            f"the autoscaler leaves out {', '.join(missing)}; make capacity simulate-scale for each of them, too"
        )
    if not chosen:
        return DEFAULT_SCALE, notes
    if len(models) == 1:
        (scale,) = chosen.values()
        return scale.model_copy(update={"cores": scale.cores or DEFAULT_CORES}), notes
    return together(chosen), notes


def write(folder: Path, overlay: Overlay, models: list[Served], runbook: str) -> None:
    """All files of the overlay; those of an earlier one that it does not have go."""
    files = {
        "kustomization.yaml": kustomization(overlay),
        "triton.yaml": triton_patch(overlay),
        "gateway.yaml": gateway_patch(overlay),
        "limits.conf": limits(models),
    }
    if overlay.autoscaler != "none":
        files["autoscaler.yaml"] = autoscaler_patch(overlay)
    if overlay.monitoring:
        rollout_min = max(ROLLOUT_MIN, MINUTES_OF_POD * overlay.scale.max_replicas)
        groups = rules(models, runbook, Scope(NAMESPACE), rollout_min)["groups"]
        groups += [load_group(overlay.scale)] if overlay.scale.rates else []
        files["alerts.yaml"] = alerts(as_yaml({"groups": groups}))
    for name, content in files.items():
        write_whole(folder / name, content)
    for name in {"autoscaler.yaml", "alerts.yaml"} - files.keys():
        (folder / name).unlink(missing_ok=True)


def write_loadtest(folder: Path, overlay: Overlay, model: Served, args: argparse.Namespace) -> bool:
    """A model's load test; False where its `deploy.toml` or its inputs are not known."""
    spec, inputs = (
        (model.models or args.models) / model.name / "deploy.toml",
        args.build / model.name / "evaluation.npz",
    )
    if not (spec.is_file() and inputs.is_file()):
        return False
    test = LoadTest(
        model=model.name,
        target=model.target,
        rate_rps=model.rate_rps or 1,
        url=args.loadtest_url,
        own_authority=_own_authority(args),
    )
    base = os.path.relpath(args.base.resolve(), folder.resolve())
    write_whole(folder / "kustomization.yaml", loadtest_kustomization(overlay, test, base))
    write_whole(folder / "deploy.toml", spec.read_text(encoding="utf-8"))
    if test.own_authority:
        write_whole(folder / "ca.crt", (args.gateway / "ca.crt").read_text(encoding="utf-8"))
    else:
        (folder / "ca.crt").unlink(missing_ok=True)
    _copy_inputs(inputs, folder / "inputs.npz")
    return True


def _own_authority(args: argparse.Namespace) -> bool:
    authority, certificate = args.gateway / "ca.crt", args.gateway / "tls.crt"
    if args.loadtest_tls or not authority.is_file():
        return False
    return not certificate.is_file() or is_signed_by(certificate, authority)


def _copy_inputs(source: Path, copy: Path) -> None:
    """The inputs, or as many of their rows as a ConfigMap holds; entries are `<row>/<input>`."""
    with np.load(source) as file, beside(copy) as draft:
        rows = sorted({name.partition("/")[0] for name in file.files})
        step = math.ceil(source.stat().st_size / CONFIG_MAP_BYTES)
        while True:
            chosen = set(rows[::step])
            np.savez_compressed(draft, **{name: file[name] for name in file.files if name.partition("/")[0] in chosen})
            if draft.stat().st_size <= CONFIG_MAP_BYTES:
                return
            if len(chosen) == 1:
                raise InputError(f"{source}: a single row is larger than a ConfigMap holds ({CONFIG_MAP_BYTES} bytes)")
            step *= 2


def _port_of(url: str) -> int:
    """The port of a URL, or of its scheme; 0 where there is no such port."""
    try:
        found = urlsplit(url)
        return {"http": 80, "https": 443}.get(found.scheme, 0) if found.port is None else found.port
    except ValueError:
        return 0


def _parse() -> argparse.Namespace:
    build = Path(os.environ.get("BUILD", "build"))
    parser = Parser(__doc__, prog="python -m serving.kubernetes")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="(default: %(default)s)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of model folders (default: models)")
    parser.add_argument("--build", type=Path, default=build, help="where scale.json lies (default: $BUILD)")
    parser.add_argument("--output", type=Path, help="folder to write (default: kubernetes/ in $BUILD)")
    parser.add_argument("--base", type=Path, default=Path("kubernetes"), help="the manifests (default: kubernetes)")
    parser.add_argument("--registry", default="", help="where the cluster pulls the images from (default: as named)")
    parser.add_argument("--image-tag", default=IMAGE_TAG, help="of the images (default: %(default)s)")
    parser.add_argument("--triton-tag", default=TRITON_TAG, help="of the GPU server's image (default: %(default)s)")
    parser.add_argument("--models-url", default="", help="of the packed repository (default: a volume, claim `models`)")
    parser.add_argument("--autoscaler", choices=("hpa", "keda", "none"), default="hpa", help="(default: %(default)s)")
    parser.add_argument("--load-balancer", action="store_true", help="give the gateway an address outside")
    parser.add_argument("--no-monitoring", action="store_true", help="for a cluster without the Prometheus operator")
    parser.add_argument("--gateway", type=Path, help="where ca.crt and tls.crt lie (default: gateway/ in $BUILD)")
    parser.add_argument(
        "--loadtest-url",
        default=GATEWAY_URL,
        help="host:port by which load tests call the gateway: a name of its certificate (default: %(default)s)",
    )
    parser.add_argument(
        "--loadtest-tls",
        action="store_true",
        help="load tests trust the system's authorities (default: ca.crt, where it signed tls.crt)",
    )
    parser.add_argument("--runbook", default=RUNBOOK, help="where alerts point to (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print what decided as JSON")
    args = parser.parse_args()
    args.gateway = args.gateway or gateway_folder()
    args.models_port = _port_of(args.models_url)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    if not (args.base / "base" / "kustomization.yaml").is_file():
        raise InputError(f"--base {args.base}: no base/kustomization.yaml in it; it is the folder kubernetes/")
    if args.models_url and not re.fullmatch(r"https?://[^/\s\"]+/[^\s\"]*", args.models_url):
        raise InputError(f"--models-url {args.models_url!r}: it must begin with https:// or http:// and name a file")
    if args.models_url and not args.models_port:
        raise InputError(f"--models-url {args.models_url!r}: a port is a number from 1 to 65535")
    host_and_port = re.fullmatch(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):\d+", args.loadtest_url)
    if not host_and_port or not _port_of(f"//{args.loadtest_url}"):
        raise InputError(f"--loadtest-url {args.loadtest_url!r}: it must be host:port, such as api.example.com:443")
    if args.no_monitoring and args.autoscaler != "none":
        raise InputError(
            f"--no-monitoring with --autoscaler {args.autoscaler}: it scales by what monitoring records; "
            "--autoscaler none, or leave --no-monitoring out"
        )
    for name in ("registry", "image_tag", "triton_tag"):
        if not re.fullmatch(r"[A-Za-z0-9._:/-]*", getattr(args, name)):
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)!r}: no name of an image has that")


def main() -> None:
    """Writes the overlay."""
    args = _parse()
    folder = args.output or args.build / "kubernetes"
    models = served_models(args.repository, args.models, other_folders(args.repository, args.gateway))
    folder.mkdir(parents=True, exist_ok=True)
    sha256, models_mib = "", 0
    if args.models_url:
        sha256, size_bytes = pack(args.repository, folder / "models.tar.gz")
        models_mib = math.ceil((size_bytes + (folder / "models.tar.gz").stat().st_size) / MIB * 1.1) + 16  # blocks
    scale, notes = _scale_of(models, args.build)
    overlay = Overlay(
        base=os.path.relpath(args.base.resolve(), folder.resolve()),
        on_gpu=any(model.needs_gpu for model in models),
        sizes=sizes(models),
        gateway=gateway_sizes(models),
        scale=scale,
        autoscaler=args.autoscaler,
        registry=args.registry,
        image_tag=args.image_tag,
        triton_tag=args.triton_tag,
        models_url=args.models_url,
        models_port=args.models_port,
        models_sha256=sha256,
        models_mib=models_mib,
        models_digest=_digest(args.repository, models),
        load_balancer=args.load_balancer,
        monitoring=not args.no_monitoring,
    )
    write(folder, overlay, models, args.runbook)
    for model in models:
        write_loadtest(folder / "loadtest" / model.name, overlay, model, args)
    if args.json:
        print(json.dumps(asdict(overlay) | {"scale": overlay.scale.model_dump()}, indent=2))
    else:
        _tell(folder, overlay, models, notes)


def _tell(folder: Path, overlay: Overlay, models: Sequence[Served], notes: Sequence[str]) -> None:
    names = ", ".join(model.name for model in models)
    scale, kind = overlay.scale, "a GPU" if overlay.on_gpu else f"{overlay.scale.cores} cores"
    targets = ", ".join(f"{target.metric} {target.value:g}" for target in scale.targets)
    bounds = f"{scale.min_replicas} to {scale.max_replicas} pods, {targets}" if overlay.autoscaler != "none" else "no"
    print(f"overlay   {folder}: {names}; {kind} and {overlay.sizes.memory_mib} MiB a pod; autoscaler: {bounds}")
    if overlay.models_url:
        print(f"models    put {folder / 'models.tar.gz'} at {overlay.models_url}")
    if overlay.autoscaler != "none":
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
