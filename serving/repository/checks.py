"""Checks a model repository from its files alone: layout, manifests, digests.

Contract: each finding is one line with one fix; nothing is changed. The doctor, the container's preflight and the
embedded server all use these functions. A model without any `manifest.json` was not made by `export.stages.publish`:
it is reported as unchecked, and Triton decides whether it loads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import FileDigest, InputError, PublishedManifest
from deepseek.spec.files.folders import SCRATCH
from deepseek.spec.files.repository import CONFIG, ENGINE, config_path, engine_model, model_folders, versions_of

MANIFEST = "manifest.json"
_TENSORRT, _TENSORRT_RTX = b"ftrt", b"vtrt"  # the first bytes of a plan; trtexec's kPLAN_FILE_TAG is 0x74727466

Level = Literal["mismatch", "warning"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: where, what is wrong, the value seen, and the fix."""

    level: Level
    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.fix}" if self.fix else "")


def mismatch(where: str, what: str, fix: str) -> Finding:
    """A finding that keeps a model from being served."""
    return Finding(level="mismatch", where=where, what=what, fix=fix)


def everything_in(model: Path) -> Iterator[Path]:
    """All files and folders of a model, sorted; a version may be a link to a folder."""
    for each in sorted(model.iterdir()) if model.is_dir() else ():
        yield each
        if each.is_dir():
            yield from sorted(each.rglob("*"))


def models_in(repository: Path) -> list[Path]:
    """The model folders; raises InputError if the repository has none."""
    found = model_folders(repository)
    if not found:
        for path in repository.iterdir() if repository.is_dir() else ():
            (path / CONFIG).is_file()  # raises PermissionError, which glob hides
        raise InputError(f"{repository}: no model in it (no */{CONFIG}); build one with: make engine")
    return found


def made_here(model: Path) -> bool:
    """Whether `export.stages.publish` made the model: any version has a manifest or its own configuration."""
    files = (model / str(version) / name for version in versions_of(model) for name in (MANIFEST, CONFIG))
    return any(file.is_file() for file in files)


def publish_again(model: Path, error: BaseException | None = None) -> str:
    """The fix for a damaged or missing version; `error` says why a file of it could not be read."""
    if isinstance(error and error.__context__, PermissionError):
        return "make it readable"
    return f"publish it again: deepseek publish --model {model.name} --repository {model.parent}"


def read_config(path: Path) -> ModelConfig:
    """Parses a `config.pbtxt`; raises InputError with line and reason if it cannot."""
    try:
        return text_format.Parse(path.read_text(), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise InputError(f"cannot be read: {' '.join(str(error).split())}") from None


def check_layout(repository: Path) -> list[Finding]:
    """Folders without a configuration: Triton, which is started without auto-completion, fails to start with them."""
    what = f"a folder without {CONFIG} in {repository}; Triton does not start with it"
    return [
        mismatch(
            path.name,
            what,
            publish_again(path) if made_here(path) else f"move it elsewhere: mv '{path}' '{repository.parent}'",
        )
        for path in sorted(repository.iterdir())
        if path.is_dir() and not path.name.startswith(SCRATCH) and not (path / CONFIG).is_file()
    ]


def config_of(model: Path, version: int | None = None) -> ModelConfig:
    """The configuration of a version (default: the newest). Raises InputError with file and reason if unreadable."""
    version = next(iter(versions_of(model)), None) if version is None else version
    return config_at(model / CONFIG if version is None else config_path(model, version))


def config_at(path: Path) -> ModelConfig:
    """Reads a `config.pbtxt`; raises InputError with file and reason if it cannot."""
    try:
        return read_config(path)
    except InputError as error:
        raise InputError(f"{path} {error}") from None


def engine_config(model: Path, version: int, config: ModelConfig) -> ModelConfig:
    """The configuration of a version's engine: `config` itself, or that of the engine behind it (`engine_model`).

    Raises InputError if it cannot be read.
    """
    if ENGINE not in config.parameters:
        return config
    return config_at(engine_model(model / str(version), model.name) / CONFIG)


def engines_behind(model: Path) -> list[Path]:
    """The folder of the engine's model behind the version that NVIDIA's Triton serves; empty if the model has none."""
    config = config_at(model / CONFIG)
    if ENGINE not in config.parameters:
        return []
    return [engine_model(model / str(version), model.name) for version in wanted_versions(config, versions_of(model))][
        :1
    ]


def wanted_versions(config: ModelConfig, versions: list[int]) -> list[int]:
    """The subset of `versions` (newest first) that the version policy serves."""
    policy = config.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return versions
    if choice == "specific":
        return [version for version in versions if version in policy.specific.versions]
    return versions[: max(1, policy.latest.num_versions)]


def served_manifests(model: Path) -> Iterator[PublishedManifest]:
    """Manifests of the served versions, newest first; raises InputError for an unreadable file."""
    for version in wanted_versions(config_of(model), versions_of(model)):
        if (place := model / str(version) / MANIFEST).is_file():
            yield PublishedManifest.load(place)


def check_version(model: Path, version: int) -> tuple[PublishedManifest | None, list[Finding]]:
    """The manifest of a version and what is wrong with its files; hashes every file."""
    folder, where = model / str(version), f"{model.name}/{version}"

    def wrong(what: str, fix: str = publish_again(model)) -> Finding:
        return mismatch(where, what, fix)

    if not (folder / MANIFEST).is_file():
        return None, [wrong(f"{MANIFEST} is missing")]
    try:
        manifest = PublishedManifest.load(folder / MANIFEST)
        findings = [wrong(what) for what in _file_errors(folder, manifest)]
    except PermissionError as error:
        return None, [wrong(f"{error.filename} cannot be read: {error.strerror}", "make it readable")]
    except (InputError, OSError) as error:
        return None, [wrong(str(error).removeprefix(f"{folder}/"))]
    if manifest.model != model.name:
        findings.append(wrong(f"is an engine of {manifest.model!r}", f"move it to {model.parent / manifest.model}"))
    if not findings and (reason := _plan_error(folder, manifest)):
        findings.append(wrong(reason))
    return manifest, findings


def _file_errors(folder: Path, manifest: PublishedManifest) -> Iterator[str]:
    for name, recorded in manifest.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != recorded.size_bytes:
            kind = "truncated" if size < recorded.size_bytes else "longer than it was"
            yield f"{name} is {kind}: {size} bytes, published were {recorded.size_bytes}"
        elif (found := FileDigest.of(path)) != recorded:
            yield f"{name} is damaged: sha256 {found.sha256[:12]}…, published was {recorded.sha256[:12]}…"


def _plan_error(folder: Path, manifest: PublishedManifest) -> str | None:
    """Why `model.plan` contradicts the manifest, from its first 28 bytes: kind and TensorRT version."""
    path = next(engine_model(folder, manifest.model).glob("*/model.plan"), folder / "model.plan")
    if manifest.target == "tensorrt_rtx":
        return "is an engine of TensorRT for RTX, which Triton cannot load"
    if manifest.target != "tensorrt":
        return None
    if not path.is_file() or not (header := plan_header(path)):
        return "its target is tensorrt, but it has no TensorRT model.plan"
    kind, version = header
    built_with = manifest.versions.get("tensorrt", "")
    if kind == "tensorrt_rtx":
        return f"model.plan is an engine of TensorRT for RTX {version}, which Triton cannot load"
    if built_with and version.split(".")[:3] != built_with.split(".")[:3]:
        return f"model.plan was built by TensorRT {version}, but its manifest says {built_with}"
    return None


def plan_header(path: Path) -> tuple[str, str] | None:
    """Kind and TensorRT version of a plan; None if the file is not a plan.

    The version is in the four bytes at byte 24, where trtexec's --getPlanVersionOnly reads it.
    """
    with path.open("rb") as file:
        head = file.read(28)
    if len(head) < 28 or head[:4] not in (_TENSORRT, _TENSORRT_RTX):
        return None
    return ("tensorrt" if head[:4] == _TENSORRT else "tensorrt_rtx"), ".".join(map(str, head[24:28]))


def not_ours(model: Path) -> Finding:
    """The warning about a model that this project did not publish."""
    return Finding(
        level="warning",
        where=model.name,
        what=f"not checked: it has no {MANIFEST}, so make engine did not publish it; Triton decides whether it loads",
    )
