"""An engine to Triton's model repository: the next version directory and `config.pbtxt`.

Contract: takes the precision that `export.stages.select_precision` chose (or `--precision`); adds
`<repository>/<name>/<next version>/` and replaces `config.pbtxt`, which names the version to serve. Both are flushed to
disk and renamed into place: a server, running or starting, never sees a partial version or one under another's
configuration. A version that a release into the same repository refused, or that a rollback removed, is published only
with `--anyway` (docs/release.md).
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import (
    TEXT,
    TOKENIZER,
    DeploymentSpec,
    FileDigest,
    GateFailed,
    InputError,
    Precision,
    PublishedManifest,
    Target,
    build_dir,
    tokenizer_path,
    variables_for,
)
from deepseek.spec.deployment import catalogue_of
from deepseek.spec.files.batching_plan import batching_of
from deepseek.spec.files.folders import alone_in, let_all_read, onto_disk, scratch_in
from deepseek.spec.files.manifest import OWN_DATA
from deepseek.spec.files.measured_batches import read_measured
from deepseek.spec.files.released import last_fate, last_number
from deepseek.spec.files.repository import TF32, engine_model, versions_of
from deepseek.spec.files.version_files import add_version, move, retire
from deepseek.spec.machine.gpus import gpus, matching
from deepseek.spec.tokenizer import text_encoder
from deepseek.spec.vocabulary import CATALOGUE, HISTORY
from deepseek.targets import PUBLISHABLE, TARGETS, in_tf32
from deepseek.vocabulary import Vocabulary
from export.artifact import (
    axes_of,
    choice_of,
    digests,
    engine_path,
    last_options,
    need,
    onnx_path,
    read_manifest,
    refusal,
    write_manifest,
)
from export.publishing.backend_files import backend_files
from export.publishing.engine_front import VERSION, put_front
from export.publishing.triton_config import config_text, cuda_graph_batches, model_config
from export.rows import Row, load_rows
from export.runtimes.onnxruntime_predictor import optimizers_left_out

WARMUP_TEXT = b"A short text, such as a caller may send."


def check_profile(spec: DeploymentSpec, engine: Path) -> None:
    """Raises InputError if the engine was built for another profile than deploy.toml has now."""
    built = read_manifest(engine).axes
    now = axes_of(spec)
    if built != now:
        raise InputError(
            f"{engine} was built for the axes {json.dumps(built)}, deploy.toml now has {json.dumps(now)}; "
            f"build it again: make engine {variables_for(spec.name)}"
        )


def check_fate(spec: DeploymentSpec, staged: Path, repository: Path) -> None:
    """Raises InputError if this version failed a gate or was rolled back, and has not been released since.

    A version that is already being served is allowed, even if another configuration of it was refused.
    """
    files = PublishedManifest.load(staged / "manifest.json").files
    fate = last_fate(spec.name, files, repository)
    served = [repository / spec.name / str(version) for version in versions_of(repository / spec.name)[:1]]
    if fate is not None and fate.bad and not any(_is_the_same(staged, each) for each in served):
        variables = variables_for(spec.name)
        raise InputError(
            f"{spec.name}: this build was {fate.outcome} as version {fate.version}, {fate.at[:16]} ({fate.folder}); "
            f"take it through the gates: make release {variables}, or publish it anyway: make engine {variables} "
            "ANYWAY=1 (--anyway)"
        )


def _is_the_same(staged: Path, served: Path) -> bool:
    """Whether two versions have the same files and configuration, apart from version numbers in warm-up names."""
    if not all((folder / name).is_file() for folder in (staged, served) for name in ("manifest.json", "config.pbtxt")):
        return False
    configs = [_unnumbered(folder) for folder in (staged, served)]
    files = [PublishedManifest.load(folder / "manifest.json").files for folder in (staged, served)]
    return configs[0] == configs[1] and files[0] == files[1]


def _unnumbered(folder: Path) -> str:
    """The configuration of a version without its number."""
    config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    config.ClearField("version_policy")
    return re.sub(rf'"{folder.name}-', '"', text_format.MessageToString(config))


def publish_version(
    spec: DeploymentSpec,
    precision: Precision,
    target: Target,
    repository: Path,
    *,
    anyway: bool = False,
    if_changed: bool = False,
) -> dict[str, Any]:
    """Adds the next version of a model to the repository; returns what it added.

    `if_changed`: adds nothing if files and configuration equal those of the newest version. Raises InputError if a
    release or rollback rejected this build, unless `anyway`.
    """
    if target not in PUBLISHABLE:
        raise InputError(f"target {target}: Triton cannot load such an engine; publish one of {', '.join(PUBLISHABLE)}")
    engine = need(
        engine_path(spec.name, precision, target), f"make engine {variables_for(spec.name)} PRECISION={precision}"
    )
    if reason := refusal(engine):
        raise InputError(f"{spec.name}: {precision} could not be made: {reason}")
    check_profile(spec, engine)
    row = load_rows(build_dir(spec.name) / "evaluation.npz")[0]
    model = repository / spec.name
    with alone_in(repository), scratch_in(_staging(spec.name, repository)) as scratch:
        staged = scratch / spec.name
        staged.mkdir()
        version = _stage(staged, spec, precision, target, engine, row, model)
        newest = max(versions_of(model), default=0)
        served = model / str(newest)
        if if_changed and _is_the_same(staged / str(version), served):
            _restore_config(model, served, scratch)
            return {"path": str(served), "version": newest, "precision": precision, "target": target, "new": False}
        if not anyway:
            check_fate(spec, staged / str(version), repository)
        onto_disk(staged)
        add_version(staged, version, model)
        retire(model)
    return {
        "path": str(model / str(version)),
        "version": version,
        "precision": precision,
        "target": target,
        "new": True,
    }


def _restore_config(model: Path, served: Path, scratch: Path) -> None:
    """Puts the newest version's configuration into the model's place if another one, or none, is there.

    A publisher that is killed before its last rename leaves the earlier version's.
    """
    config, own = model / "config.pbtxt", (served / "config.pbtxt").read_bytes()
    if not config.is_file() or config.read_bytes() != own:
        (scratch / "config.pbtxt").write_bytes(own)
        onto_disk(scratch / "config.pbtxt")
        let_all_read(scratch)
        move(scratch / "config.pbtxt", config)


def _staging(name: str, repository: Path) -> Path:
    """Where a version is laid out: on the repository's disk, so that a full disk changes nothing.

    If the build folder is on another disk, in the model's folder: NVIDIA's Triton would take what a killed publisher
    leaves in the repository itself for a model.
    """
    build, model = build_dir(name), repository / name
    if build.stat().st_dev == repository.stat().st_dev:
        return build
    return model if model.is_dir() else repository


def _stage(
    staged: Path, spec: DeploymentSpec, precision: Precision, target: Target, engine: Path, row: Row, model: Path
) -> int:
    """Lays out version, warm-up and configuration in `staged`; returns the version number."""
    version = last_number(model) + 1
    folder = staged / str(version)
    folder.mkdir()
    front = spec.has_front(target)
    place = engine_model(folder, spec.name) / str(VERSION) if front else folder
    place.mkdir(parents=True, exist_ok=True)
    for file in engine.parent.glob(f"{engine.name}*"):
        shutil.copyfile(file, place / file.name)
    for name, source in backend_files(spec, target).items():
        shutil.copyfile(source, folder / name)
    (staged / "warmup").mkdir()
    if spec.text_for(target):
        tokenizer = tokenizer_path(spec)
        text_encoder(spec, tokenizer)  # raises InputError if it cannot be read
        shutil.copyfile(tokenizer, folder / TOKENIZER)
        if not front:
            pairs = spec.text is not None and spec.text.pairs
            _write_string(staged / "warmup" / f"{version}-{TEXT}", WARMUP_TEXT, 2 if pairs else 1)
    graph = engine if TARGETS[target].is_graph else onnx_path(spec.name, "fp32")  # all engines come from that one
    vocabulary = _stage_vocabulary(folder, spec, graph) if spec.vocabulary_for(target) else None
    if vocabulary is not None and not front:
        _write_string(staged / "warmup" / f"{version}-{HISTORY}", vocabulary.names[1])
    plan = batching_of(spec.for_target(target), read_measured(spec.name, target), precision)
    built = read_manifest(engine)
    device, on_gpus = built.settings.get("device", "cpu"), []
    if target == "tensorrt":
        on_gpus = matching(gpus(), built.compute_capability, built.settings)
    left_out = optimizers_left_out(engine) if target == "onnxruntime" else []
    warmup = {str(VERSION if front else version): row}
    config = model_config(spec, precision, target, warmup, device, left_out, on_gpus, plan, vocabulary)
    if precision == "fp32" and in_tf32(target, spec.onnxruntime.provider, built.found):
        config.parameters[TF32].string_value = "true"
    if front:
        config = put_front(config, spec, target, folder, row, vocabulary)
    else:
        for name, array in row.items():
            (staged / "warmup" / f"{version}-{name}").write_bytes(array.tobytes())
    manifest = published_manifest(spec, target, engine, folder).model_copy(update={"batching": plan})
    write_manifest(folder / "manifest.json", manifest)
    config.version_policy.specific.versions.append(version)
    for place in (staged, folder):  # a server that rolls back to the version uses its own copy
        (place / "config.pbtxt").write_text(config_text(config))
    return version


def _stage_vocabulary(folder: Path, spec: DeploymentSpec, graph: Path) -> Vocabulary:
    """Adds the catalogue to a version's folder. Returns the names of the items.

    Raises InputError if the catalogue cannot be read, or is not that of the graph.
    """
    catalogue, found = catalogue_of(spec)
    need(graph, f"make engine {variables_for(spec.name)}")
    sizes = {size for weight in onnx.load(graph, load_external_data=False).graph.initializer for size in weight.dims}
    if len(found) + 1 not in sizes:  # an embedding of the items and of 0
        raise InputError(
            f"{catalogue}: {len(found)} items, but no weight of the graph has a dimension of {len(found) + 1}; put the "
            f"catalogue of this model there: ids 1 to its number of items, and 0 for none"
        )
    shutil.copyfile(catalogue, folder / CATALOGUE)
    return found


def _write_string(path: Path, value: bytes, times: int = 1) -> None:
    """Writes a warm-up file of strings."""
    path.write_bytes((len(value).to_bytes(4, "little") + value) * times)


def published_manifest(spec: DeploymentSpec, target: Target, engine: Path, folder: Path) -> PublishedManifest:
    """The manifest for a copy of an engine in `folder`; raises GateFailed if the copy differs from the build."""
    built = read_manifest(engine)
    files = digests(folder)
    behind = engine_model(folder, spec.name)
    files |= {str(path.relative_to(folder)): FileDigest.of(path) for path in behind.rglob("*") if path.is_file()}
    inside = (behind / str(VERSION)).relative_to(folder)
    for name, digest in built.files.items():
        if name.startswith(engine.name) and digest not in (files.get(name), files.get(f"{inside}/{name}")):
            raise GateFailed(
                f"{engine.parent / name} was changed after the build; build it again: make clean engine "
                f"{variables_for(spec.name)}"
            )
    signature = {"inputs": spec.inputs, "outputs": spec.outputs}
    graphs = {"cuda_graph_batches": cuda_graph_batches(spec.for_target(target))} if target == "tensorrt" else {}
    data = {OWN_DATA: True} if last_options(spec.name).get("data") else {}
    settings = {**built.settings, **graphs, **data}
    return PublishedManifest(**{**dict(built), "target": target, "files": files, "settings": settings, **signature})


def main(options: argparse.Namespace) -> None:
    spec = DeploymentSpec.to_build(options.model, options.models, tuned=options.tuned)
    precision, provider = (options.precision, None) if options.precision else choice_of(spec.name, options.target)
    if provider:  # the server must not run on other hardware than the one that was measured
        spec = spec.model_copy(update={"onnxruntime": spec.onnxruntime.model_copy(update={"provider": provider})})
    if spec.for_target(options.target).batching.instances == 1:
        print(
            "warning: batching.instances = 1: a Triton that this project does not start can stall, see docs/triton.md",
            file=sys.stderr,
        )
    result = publish_version(
        spec, precision, options.target, Path(options.repository), anyway=options.anyway, if_changed=options.if_changed
    )
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{result['path']}: {'' if result['new'] else 'unchanged, '}{result['precision']} for {result['target']}, "
            f"batches of up to {spec.for_target(options.target).max_served_batch}"
        )
