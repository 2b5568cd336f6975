"""Whether the engines of a model repository will run here: manifests against machine and configuration.

Contract: reads each served version's `manifest.json` and files, `config.pbtxt`, and this machine; changes nothing.
Every mismatch is one line with one fix. Exit 0: all well, or only warnings; 1: a mismatch (with --strict also a
warning); 2: there is no repository to judge. With --preflight it is the step before `tritonserver` in a container: what
Docker and the disk are like is the host's concern then, and only the versions that Triton would load are read; with
--embedded, too, only a model of which no version is good is a mismatch: that server serves an older one.

Examples:
    python -m serving.doctor --repository model_repository
    python -m serving.doctor --model recommender --triton-tag 26.10 --json
    python -m serving.doctor --repository /models --preflight && exec tritonserver --model-repository /models
    python -m serving.doctor --repository /models --preflight --embedded && exec python -m serving.embedded
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import BATCH, InputError, Parser, PublishedManifest, run_command
from deepseek.spec.repository import config_path, versions_of
from deepseek.spec.triton_release import OLDEST, OLDEST_TAG, TRITON_TAG, parse_tag
from serving.flags import VERSION_COMPATIBLE
from serving.machine import Gpu, Machine
from serving.repository import (
    CONFIG,
    Finding,
    Level,
    check_config,
    check_layout,
    check_version,
    made_here,
    models_in,
    not_ours,
    publish_again,
    read_config,
    wanted_versions,
)
from serving.view import decide

DISK_BYTES_S = 500e6  # sequential, what the deployment guide asks for checkpoints
SHM_OFF_TAG = (26, 4)  # Triton refuses clients' shared memory from here on unless told otherwise
CUDA_13_TAG, CUDA_13_DRIVER = (25, 8), 580  # CUDA 13 came with 25.08; its oldest driver, minor versions included
_ORDER: dict[Level, int] = {"mismatch": 0, "warning": 1, "info": 2}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A version that Triton would serve."""

    model: str
    version: int
    manifest: PublishedManifest
    config: ModelConfig

    @property
    def memory_bytes(self) -> int:
        """Least memory for its weights: each instance of the Python backend is a process with its own."""
        copies = self.config.instance_group[0].count if self.config.instance_group else 1
        return self.manifest.size_bytes * (copies if self.config.backend == "python" else 1)


def examine(
    repository: Path, machine: Machine, *, model: str | None = None, kept: bool = True
) -> tuple[list[Engine], list[Finding]]:
    """The engines that would be served, and all that was found; `kept`: older versions are looked at, too."""
    models = models_in(repository)
    if model is not None:
        chosen = [path for path in models if path.name == model]
        if not chosen:
            raise InputError(f"no model {model!r} in {repository}; it has {', '.join(path.name for path in models)}")
        models = chosen
    engines: list[Engine] = []
    findings = check_layout(repository)
    for path in models:
        if not made_here(path) and versions_of(path):
            findings.append(not_ours(path))
            continue
        more, found = _examine_model(path, machine, kept)
        engines += more
        findings += found
    findings += _machine_findings(machine, engines)
    return engines, sorted(findings, key=lambda finding: _ORDER[finding.level])


def _examine_model(model: Path, machine: Machine, kept: bool) -> tuple[list[Engine], list[Finding]]:
    """One model: each version that is served, under its configuration, on the machine."""
    versions = versions_of(model)
    if not versions:
        return [], [_mismatch(model.name, "it has no version directory, over which Triton fails", publish_again(model))]
    path = config_path(model, versions[0])
    try:
        config = read_config(path)
        findings = [] if path == model / CONFIG else [_cut_off(model, path)]
        if config.backend != "python":  # served by a Triton that reads the repository itself
            config = read_config(model / CONFIG)
    except InputError as error:
        return [], [_mismatch(f"{model.name}/{CONFIG}", str(error), publish_again(model))]
    engines: list[Engine] = []
    served = wanted_versions(config, versions)
    for version in served:
        manifest, wrong = check_version(model, version)
        findings += wrong
        if manifest is None:
            continue
        engine = Engine(model=model.name, version=version, manifest=manifest, config=config)
        engines.append(engine)
        findings += [each for each in check_config(model, config, manifest) if each not in findings]
        findings += _TARGET_CHECKS[manifest.target](engine, machine) if manifest.target in _TARGET_CHECKS else []
    for version in versions if kept else ():
        if version not in served:  # not served, but there to go back to
            findings += [replace(each, level="warning") for each in check_version(model, version)[1]]
    return engines, findings


def for_embedded(repository: Path, findings: list[Finding], engines: list[Engine], machine: Machine) -> list[Finding]:
    """As the embedded server takes them, which serves the newest good version: a mismatch is a model without any.

    What is the machine's stays: no older version changes that.
    """
    checked = [(engine, _TARGET_CHECKS.get(engine.manifest.target)) for engine in engines]
    here = [each for engine, check in checked if check for each in check(engine, machine)]
    wrong = {each.where.partition("/")[0] for each in findings if each.level == "mismatch"}
    decided = {model.name: decide(model) for model in models_in(repository) if model.name in wrong}
    without = {name: decision for name, decision in decided.items() if decision.config is None}

    def is_left_out(finding: Finding) -> bool:
        folder = finding.where.partition("/")[0]
        return folder not in without and finding not in here and (repository / folder).is_dir()

    taken = [
        replace(each, level="warning") if each.level == "mismatch" and is_left_out(each) else each for each in findings
    ]
    taken += [each for decision in without.values() for each in decision.findings if each not in taken]
    return sorted(taken, key=lambda finding: _ORDER[finding.level])


def _cut_off(model: Path, own: Path) -> Finding:
    """The newest version came, and its configuration did not."""
    what = f"is that of an older version: whoever published {own.parent.name} was cut off"
    return Finding(
        level="warning", where=f"{model.name}/{CONFIG}", what=what, fix=f"end it: cp '{own}' '{model / CONFIG}'"
    )


def _mismatch(where: str, what: str, fix: str) -> Finding:
    return Finding(level="mismatch", where=where, what=what, fix=fix)


def _rebuild(engine: Engine) -> str:
    return f"build it for here: make engine MODEL={engine.model} TARGET={engine.manifest.target}"


def _check_tensorrt(engine: Engine, machine: Machine) -> Iterator[Finding]:
    """An engine runs on the GPUs and in the TensorRT that it was built for."""
    yield from _check_chip(engine, machine)
    yield from _check_release(engine, machine)
    if engine.manifest.settings.get("version_compatible"):
        what = f"is version compatible, which Triton takes with {VERSION_COMPATIBLE} alone"
        fix = "docker/server.sh gives it; for a start of your own: python -m serving.flags --repository …"
        yield Finding(level="info", where=f"{engine.model}/{engine.version}", what=what, fix=fix)


def _check_chip(engine: Engine, machine: Machine) -> Iterator[Finding]:
    where, manifest = f"{engine.model}/{engine.version}", engine.manifest
    built = manifest.compute_capability
    if not machine.gpus:
        what = f"needs a GPU{f' of compute capability {built}' if built else ''}, nvidia-smi shows none"
        yield _mismatch(where, what, "give it one (docker run --gpus all), or make engine TARGET=onnxruntime")
    elif built and not any(_runs_on(manifest, gpu) for gpu in machine.gpus):
        here = ", ".join(f"{gpu.name} {gpu.compute_capability}" for gpu in machine.gpus)
        yield _mismatch(where, f"was built for compute capability {built}, here is {here}", _rebuild(engine))


def _check_release(engine: Engine, machine: Machine) -> Iterator[Finding]:
    """In Triton's container its TensorRT counts; elsewhere the container's tag, whatever TensorRT a host has itself."""
    where, manifest = f"{engine.model}/{engine.version}", engine.manifest
    built, tag = manifest.versions.get("tensorrt"), manifest.versions.get("triton_tag")
    here = machine.tensorrt if machine.in_container else None
    rebuild = f"{_rebuild(engine)} TRITON_TAG={machine.triton_tag}"
    if here and built:
        if not _loads(manifest, built, here):
            yield _mismatch(where, f"was built by TensorRT {built}, here is {here}", rebuild)
    elif tag is None or (manifest.settings.get("version_compatible") and tag < machine.triton_tag):
        place = f"in the container of {tag}" if tag else "outside the containers"
        builder = f"TensorRT {built or 'of unknown version'} {place}"
        what = f"was built by {builder}, and the one of Triton {machine.triton_tag} decides at its start"
        yield Finding(level="warning", where=where, what=what, fix=rebuild)
    elif tag != machine.triton_tag:
        what = f"was built in the container of {tag}, Triton's is to be {machine.triton_tag}"
        yield _mismatch(where, what, rebuild)


def _runs_on(manifest: PublishedManifest, gpu: Gpu) -> bool:
    """By TensorRT's hardware compatibility levels."""
    if manifest.settings.get("hardware_compatibility") == "ampere_plus":
        return tuple(map(int, gpu.compute_capability.split("."))) >= (8, 0)
    return gpu.compute_capability == manifest.compute_capability


def _loads(manifest: PublishedManifest, built: str, here: str) -> bool:
    """Whether a TensorRT loads a plan: the same version; a later one of the same major if it is version compatible."""
    old, new = built.split(".")[:3], here.split(".")[:3]
    if manifest.settings.get("version_compatible"):
        return old[0] == new[0] and [int(part) for part in new] >= [int(part) for part in old]
    return old == new


def _check_onnxruntime(engine: Engine, machine: Machine) -> Iterator[Finding]:
    """The Python backend imports ONNX Runtime and opens the execution provider that was asked for."""
    where = f"{engine.model}/{engine.version}"
    if engine.config.backend != "python":
        return
    if machine.onnxruntime is None:
        yield _mismatch(where, "ONNX Runtime cannot be imported here", f"{sys.executable} -m pip install onnxruntime")
        return
    asked = engine.config.parameters["provider"].string_value
    names = {name.lower().removesuffix("executionprovider") for name in machine.onnxruntime}
    if asked not in ("", "auto") and asked not in names:
        what = f"asks for the execution provider {asked!r}, ONNX Runtime here has {', '.join(sorted(names))}"
        yield _mismatch(where, what, 'install the build that has it, or set onnxruntime.provider = "auto"')


_TARGET_CHECKS = {"tensorrt": _check_tensorrt, "onnxruntime": _check_onnxruntime}


def _machine_findings(machine: Machine, engines: list[Engine]) -> list[Finding]:
    """What is to be said of the machine, given all that it has to serve."""
    on_gpu = [engine for engine in engines if engine.manifest.target == "tensorrt"]
    on_cpu = [engine for engine in engines if engine.manifest.target != "tensorrt"]
    gpu_bytes = max((gpu.memory_bytes for gpu in machine.gpus), default=0)
    return [
        *_check_tag(machine),
        *_check_driver(machine, bool(on_gpu)),
        *(_check_memory("GPU memory", gpu_bytes, on_gpu) if gpu_bytes else ()),
        *_check_memory("RAM", machine.ram_bytes, on_cpu),
        *(() if machine.in_container else _check_docker(machine, bool(on_gpu))),
        *_check_disk(machine),
    ]


def _check_tag(machine: Machine) -> Iterator[Finding]:
    tag = parse_tag(machine.triton_tag)
    if tag < OLDEST_TAG:
        what = f"{machine.triton_tag} has published vulnerabilities, {OLDEST} is the oldest allowed"
        yield _mismatch("TRITON_TAG", what, f"set TRITON_TAG={TRITON_TAG} and build the engines in it")
    if tag >= SHM_OFF_TAG:
        what = f"shared memory of clients is off in {machine.triton_tag}; deepseek-client sends tensors without it"
        fix = "for a client that needs it, start Triton with --allow-client-shm=true"
        yield Finding(level="info", where="clients", what=what, fix=fix)


def _check_driver(machine: Machine, needed: bool) -> Iterator[Finding]:
    for gpu in machine.gpus if needed and parse_tag(machine.triton_tag) >= CUDA_13_TAG else ():
        major = gpu.driver.partition(".")[0]
        if major.isdigit() and int(major) < CUDA_13_DRIVER:
            what = (
                f"{gpu.name}: {gpu.driver} is older than CUDA 13's {CUDA_13_DRIVER}, the CUDA of {machine.triton_tag}"
            )
            fix = "update it; only data-centre GPUs may run on an older one, by CUDA's forward compatibility"
            yield Finding(level="warning", where="driver", what=what, fix=fix)


def _check_memory(kind: str, have_bytes: int, engines: list[Engine]) -> Iterator[Finding]:
    need_bytes = sum(engine.memory_bytes for engine in engines)
    if need_bytes > 0.8 * have_bytes:
        names = ", ".join(sorted({engine.model for engine in engines}))
        what = f"{_mib(have_bytes)} here, the weights of {names} alone take {_mib(need_bytes)}"
        level: Level = "mismatch" if need_bytes > have_bytes else "warning"
        fix = "serve fewer models or instances here, or use a lower precision"
        yield Finding(level=level, where=kind, what=what, fix=fix)


def _check_docker(machine: Machine, needed: bool) -> Iterator[Finding]:
    if not needed:
        if machine.docker is None:
            what = "no Docker engine answers; what is here needs none"
            yield Finding(level="info", where="Docker", what=what, fix="make serve runs it in the embedded Triton")
    elif machine.docker is None:
        yield _mismatch("Docker", "no Docker engine answers, and Triton's TensorRT backend is in its image", "start it")
    elif "nvidia" not in machine.docker:
        what = f"its runtimes are {', '.join(machine.docker)}: containers see no GPU"
        yield _mismatch("Docker", what, "install nvidia-container-toolkit and run nvidia-ctk runtime configure")


def _check_disk(machine: Machine) -> Iterator[Finding]:
    disk = machine.disk
    if disk is not None and min(disk.write_bytes_s, disk.read_bytes_s) < DISK_BYTES_S:
        speeds = f"{disk.write_bytes_s / 1e6:.0f} MB/s written, {disk.read_bytes_s / 1e6:.0f} MB/s read"
        what = f"{disk.folder}: {speeds} in sequence; checkpoints want {DISK_BYTES_S / 1e6:.0f} MB/s"
        yield Finding(level="warning", where="disk", what=what, fix="set BUILD to a folder on a faster disk")


def _mib(value_bytes: float) -> str:
    return f"{value_bytes / 2**20:,.{0 if value_bytes >= 2**24 else 2}f} MiB"


def _print_table(engines: list[Engine], machine: Machine) -> None:
    table = Table("engine", "precision", "target", "batch", "size", "drop", box=box.SIMPLE_HEAD)
    for engine in engines:
        manifest = engine.manifest
        drop = (manifest.accuracy or {}).get("drop")
        table.add_row(
            f"{engine.model}/{engine.version}",
            manifest.precision,
            manifest.target,
            f"{manifest.axes[BATCH]['min']} to {manifest.axes[BATCH]['max']}",
            _mib(manifest.size_bytes),
            "" if drop is None else f"{drop:+.2%}",
        )
    Console(markup=False).print(table)
    gpus = ", ".join(f"{gpu.name} ({gpu.compute_capability}, driver {gpu.driver})" for gpu in machine.gpus)
    print(f"machine   {gpus or 'no GPU'}; {_mib(machine.ram_bytes)} RAM; Triton {machine.triton_tag}")


def main() -> int:
    """Examines a repository; 1 where something does not fit."""
    parser = Parser(__doc__, prog="python -m serving.doctor")
    parser.add_argument("--repository", default="model_repository", help="model repository (default: %(default)s)")
    parser.add_argument("--model", help="one model of it (default: all)")
    parser.add_argument("--triton-tag", help=f"Triton's release, YY.MM (default: $TRITON_TAG, else {TRITON_TAG})")
    parser.add_argument("--preflight", action="store_true", help="inside the container, before tritonserver starts")
    parser.add_argument("--embedded", action="store_true", help="the embedded server serves an older version, too")
    parser.add_argument("--disk", help="folder whose disk is measured (default: $BUILD, else build)")
    parser.add_argument("--strict", action="store_true", help="a warning fails, too")
    parser.add_argument("--json", action="store_true", help="print all that was found as JSON")
    args = parser.parse_args()
    folder = None if args.preflight else Path(args.disk or os.environ.get("BUILD", "build"))
    repository = Path(args.repository)
    models_in(repository)  # nothing is measured where there is nothing to judge
    machine = Machine.detect(triton_tag=args.triton_tag, in_container=args.preflight, disk_folder=folder)
    engines, findings = examine(repository, machine, model=args.model, kept=not args.preflight)
    if args.embedded:
        findings = for_embedded(repository, findings, engines, machine)
    failing = ("mismatch", "warning") if args.strict else ("mismatch",)
    holds = not any(finding.level in failing for finding in findings)
    if args.json:
        found = [asdict(finding) for finding in findings]
        served = [
            {"model": each.model, "version": each.version, **each.manifest.model_dump(mode="json", exclude={"model"})}
            for each in engines
        ]
        result = {"holds": holds, "findings": found, "engines": served, "machine": asdict(machine)}
        print(json.dumps(result, indent=2))
        return 0 if holds else 1
    if holds and not args.preflight:
        _print_table(engines, machine)
    for finding in findings:
        if finding.level != "info" or (holds and not args.preflight):
            print(f"{finding.level:<9} {finding}", file=sys.stderr if args.preflight else sys.stdout)
    return 0 if holds else 1


if __name__ == "__main__":
    run_command(main)
