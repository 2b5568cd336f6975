"""The build pipeline: what a change rebuilds, and the inputs and keys of its stages."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
from collections.abc import Callable
from functools import cache as cache_calls
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import DeploymentSpec, Target
from deepseek.spec.files.measured_batches import batches_path
from deepseek.spec.machine.cpu import Cpu
from deepseek.spec.vocabulary import CATALOGUE
from export import build, pipeline, plan
from export.artifact import refuse
from export.dependencies import digests
from export.pipeline import Stage
from serving.release.journal import ReleaseJournal

DEPLOY = """
name = "tiny"
tuned = "tuned.toml"
[inputs.x]
dtype = "float32"
shape = ["batch", 4]
[outputs.y]
dtype = "float32"
shape = ["batch", 4]
[axes.batch]
min = 1
opt = 2
max = 4
"""
MODEL = "import torch\nimport words\nfrom deepseek import Transformer\n"
GRAPHS = ["quantize fp16", "quantize int8"]
SELECT, MEASURE = "select_precision onnxruntime", "measure-batches onnxruntime"
# What a build reads each time and no test changes.
IMAGE_TAG = cache_calls(pipeline.image_tag)
INSTALLED = {name: cache_calls(getattr(importlib.metadata, name)) for name in ("version", "requires")}


def options_of(folder: Path, **changed: Any) -> argparse.Namespace:
    """Options of `deepseek engine` for the model in `folder`."""
    known: dict[str, Any] = {"model": "tiny", "models": folder / "models", "precision": "auto", "target": "onnxruntime"}
    known |= {"prune": None, "data": "", "native": False, "triton_tag": "", "repository": folder / "repository"}
    known |= {"anyway": False, "env_file": folder / "env", "project": None, "gateway_port": None, "host": []}
    return argparse.Namespace(**known | {"local_ports": None, "explain": False} | changed)


@pytest.fixture
def tiny(tmp_path: Path, own_build: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder `models/tiny`, with a build folder and a cache of its own."""
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    for name, text in {"deploy.toml": DEPLOY, "model.py": MODEL, "words.py": "import shared_words\n"}.items():
        (folder / name).write_text(text)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "shared_words.py").write_text("WORDS = []\n")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    return tmp_path


Run = Callable[..., list[str]]


@pytest.fixture
def engine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Builds with stages that write only their keys; returns the stages that ran."""
    ran: list[str] = []

    def pretend(builder: build.Builder, stage: Stage, lock: int) -> None:
        ran.append(stage.name.split(" /")[0])
        for path in (*stage.writes, *stage.beside):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(builder.keys(stage)))

    def run(publish: bool = True, **changed: Any) -> list[str]:
        ran.clear()
        build.build(options_of(tiny, **changed), publish)
        return list(ran)

    monkeypatch.setattr(build.Builder, "_execute", pretend)
    monkeypatch.setattr(pipeline, "image_tag", IMAGE_TAG)
    for name, read in INSTALLED.items():
        monkeypatch.setattr(importlib.metadata, name, read)
    return run


def test_a_second_build_runs_nothing_and_pruning_can_be_turned_on_and_off(
    engine: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine() == ALL
    assert engine() == []
    assert engine(prune=0.25) == ["prune", *ALL[1:]]
    assert engine(prune=0.25) == []
    assert engine() == ALL[1:]
    assert not (tiny / "build" / "tiny" / "pruned.safetensors").exists()
    edit("models/tiny/model.py", "# other layers\n")(tiny, monkeypatch)
    assert engine(prune=0.25) == ["train", "prune", *ALL[1:]]


def test_a_release_builds_without_publishing(engine: Run, tiny: Path) -> None:
    assert engine(publish=False) == ALL[: -len(SERVED)]
    assert engine() == SERVED


def test_each_file_of_a_folder_of_data_counts(engine: Run, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tiny / "logs"
    logs.mkdir()
    (logs / "1.csv").write_text("a")
    engine()
    engine(data=str(logs))
    assert "train: DATA changed from - to a folder" in capsys.readouterr().out
    assert engine(data=str(logs)) == []
    (logs / "2.csv").write_text("b")
    assert engine(data=str(logs))[0] == "train"
    assert "DATA is not set" not in capsys.readouterr().out
    engine()
    assert f"engine    DATA is not set; the last build had DATA={logs}\n" in capsys.readouterr().out


def test_data_that_does_not_exist_is_not_taken_for_none(engine: Run, tiny: Path) -> None:
    engine()
    assert engine(data=str(tiny / "absent.csv"))[0] == "train"  # whose model.py refuses it


Change = Callable[[Path, pytest.MonkeyPatch], object]


def edit(name: str, text: str) -> Change:
    """Adds text to a file below the test's folder."""

    def change(folder: Path, patch: pytest.MonkeyPatch) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return change


def source(name: str) -> Change:
    """Changes the digest of a file of this repository."""
    of, path = digests.RememberedDigests.of, Path(name).resolve()

    def edited(remembered: digests.RememberedDigests, file: Path) -> str | None:
        return "edited" if file.resolve() == path else of(remembered, file)

    return lambda folder, patch: patch.setattr(digests.RememberedDigests, "of", edited)


def version(name: str) -> Change:
    """Changes the version of an installed package."""
    of = INSTALLED["version"]
    return lambda folder, patch: patch.setattr(
        importlib.metadata, "version", lambda each: "0.0.1" if each == name else of(each)
    )


def machine(name: str, value: object) -> Change:
    """Changes what the pipeline sees of this machine."""
    return lambda folder, patch: patch.setattr(pipeline, name, lambda: value)


SERVED = ["publish", "stack"]
MEASURED = [MEASURE, *SERVED]
CHOSEN = [SELECT, *MEASURED]
ALL = ["train", "to_onnx", *GRAPHS, *CHOSEN]


@pytest.mark.parametrize(
    ("change", "ran"),
    [
        (edit("models/tiny/deploy.toml", "# a comment\n"), []),
        (edit("models/tiny/deploy.toml", "[tensorrt]\nworkspace_mib = 64\n"), []),
        (edit("models/tiny/deploy.toml", "[precision]\nmax_drop = 0.02\n"), ["quantize int8", *CHOSEN]),
        (edit("models/tiny/deploy.toml", "[precision]\ncandidates = ['int8', 'fp16']\n"), ["quantize int8", *CHOSEN]),
        (edit("models/tiny/deploy.toml", "[precision]\nkeep_high = ['x']\n"), [*GRAPHS, *CHOSEN]),
        (edit("models/tiny/deploy.toml", "[slo]\np99_ms = 7\n"), MEASURED),
        (edit("models/tiny/deploy.toml", "[targets.onnxruntime.slo]\np99_ms = 7\n"), MEASURED),
        (edit("models/tiny/deploy.toml", "[batching]\nmax_queue_size = 7\n"), SERVED),
        (edit("models/tiny/tuned.toml", "[targets.onnxruntime.batching]\nmax_batch = 2\n"), MEASURED),
        (edit("models/tiny/deploy.toml", "[batching]\nthreads = 3\n"), CHOSEN),
        (machine("cpu", "arm64 sve"), CHOSEN),
        (machine("this_cpu", Cpu(model="EPYC", cores=1)), MEASURED),
        (edit("models/tiny/notes.txt", "new"), ALL),
        (edit("elsewhere/shared_words.py", "MORE = 1\n"), ALL),
        (source("deepseek/transformer.py"), ALL),
        (source("export/stages/to_onnx.py"), ["to_onnx", *GRAPHS, *CHOSEN]),
        (source("export/stages/quantize.py"), [*GRAPHS, *CHOSEN]),
        (source("export/stages/select_precision.py"), CHOSEN),
        (source("export/stages/measure_batches.py"), MEASURED),
        (source("deepseek/spec/files/batching_plan.py"), MEASURED),
        (source("serving/backend/compute_slots.py"), SERVED),
        (source("serving/stack/stack.py"), ["stack"]),
        (lambda folder, patch: (folder / "env").write_text(""), ["stack"]),
        (source("docker/observe/prometheus/prometheus.yml"), ["stack"]),
        (source("deepseek/spec/files/manifest.py"), ["to_onnx", *GRAPHS, *CHOSEN]),
        (version("onnxslim"), [*GRAPHS, *CHOSEN]),
        (version("torch"), ALL),
    ],
)
def test_a_change_rebuilds_only_what_depends_on_it(
    engine: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, change: Change, ran: list[str]
) -> None:
    engine()
    change(tiny, monkeypatch)
    assert engine() == ran


def test_a_rollback_makes_the_next_build_publish_again(engine: Run, tiny: Path) -> None:
    engine()
    journal = ReleaseJournal(
        tiny / "build" / "tiny" / "releases", "rollback", 1, before=2, repository=str(tiny / "repository")
    )
    assert engine() == []
    journal.write(outcome="rolled back")
    assert engine() == SERVED  # publishing refuses a version that was rolled back
    assert engine() == []


def test_an_slo_that_changes_no_configuration_still_rewrites_the_stack(
    engine: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine()
    written = build.Builder._execute

    def publishing_nothing(builder: build.Builder, stage: Stage, lock: int) -> None:
        kept = {path: path.read_bytes() for path in stage.beside}
        written(builder, stage, lock)
        for path, content in kept.items():
            path.write_bytes(content)

    monkeypatch.setattr(build.Builder, "_execute", publishing_nothing)
    edit("models/tiny/deploy.toml", "[slo]\nmax_error_rate = 0.02\n")(tiny, monkeypatch)
    assert engine() == MEASURED


def keys(folder: Path, stage: str) -> dict[str, str]:
    """The cache keys of a stage and of its parts."""
    builder = build.Builder(build.build_plan_of(options_of(folder)))
    return next(builder.keys(each) for each in build.stages_of(builder.plan) if each.name == stage)


def test_the_version_of_a_required_package_is_an_input_even_if_it_is_not_imported(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "models" / "tiny" / "requirements.txt").write_text("pytest\n")
    before = keys(tiny, "to_onnx")
    version("pytest")(tiny, monkeypatch)
    assert keys(tiny, "to_onnx") != before


@pytest.mark.parametrize(
    ("stage", "part"), [("quantize int8", "calibrate int8"), (SELECT, "accuracy fp16"), (MEASURE, "times")]
)
def test_changing_the_accuracy_budget_neither_recalibrates_nor_remeasures(
    engine: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, stage: str, part: str
) -> None:
    engine()
    before = keys(tiny, stage)
    edit("models/tiny/deploy.toml", "[precision]\nmax_drop = 0.02\n")(tiny, monkeypatch)
    engine()
    after = keys(tiny, stage)
    assert (after[part] == before[part], after[""] == before[""]) == (True, False)


def test_only_candidates_may_fail_alone(tiny: Path) -> None:
    def alone(**changed: Any) -> list[str]:
        of_plan = build.stages_of(build.build_plan_of(options_of(tiny, target="tensorrt_rtx", **changed)))
        return [stage.name for stage in of_plan if "--candidate" in stage.command]

    assert alone() == [*GRAPHS, "to_tensorrt fp16", "to_tensorrt int8"]
    assert alone(precision="int8") == []


def test_a_candidate_that_could_not_be_made_is_not_tried_again(
    engine: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = build.Builder._execute

    def refusing(builder: build.Builder, stage: Stage, lock: int) -> None:
        written(builder, stage, lock)
        if stage.name == "quantize int8":
            stage.beside[0].unlink()
            refuse(stage.writes[0], "no layer to quantize")

    monkeypatch.setattr(build.Builder, "_execute", refusing)
    assert "quantize int8" in engine()
    assert engine() == []


def test_changed_external_weights_change_the_accuracy_key(engine: Run, tiny: Path) -> None:
    engine()
    before = keys(tiny, SELECT)
    (tiny / "build" / "tiny" / "fp16" / "model.onnx.data").write_bytes(b"weights")
    changed = {part for part, key in keys(tiny, SELECT).items() if key != before[part]}
    assert changed == {"", "accuracy fp16"}


def test_an_engine_is_recompiled_if_the_workspace_or_tensorrt_changes(
    engine: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = {"target": "tensorrt_rtx", "precision": "fp16"}
    compiled = ["to_tensorrt fp16", "to_tensorrt fp32", "select_precision tensorrt_rtx"]
    assert engine(**rtx) == ["train", "to_onnx", "quantize fp16", *compiled]
    edit("models/tiny/deploy.toml", "[tensorrt]\nworkspace_mib = 64\n")(tiny, monkeypatch)
    assert engine(**rtx) == compiled
    version("tensorrt-rtx")(tiny, monkeypatch)
    assert engine(**rtx) == compiled


def test_only_stages_that_run_the_model_depend_on_its_code_and_only_those_of_an_accelerator_on_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "gpu", lambda: "H100")
    monkeypatch.setattr(pipeline, "accelerator", lambda: "A100")
    seen: dict[Target, dict[str, dict[str, str]]] = {"onnxruntime": {}, "torchscript": {}, "tensorrt_rtx": {}}
    for target, inputs in seen.items():
        builder = build.Builder(plan.build_plan_of(options_of(tiny, target=target)))
        for stage in build.stages_of(builder.plan):
            inputs[stage.name] = builder.inputs.of(stage)
            assert "quantize" not in stage.name or ("--target", target) in itertools.pairwise(stage.command)
        measured = batches_path("tiny", target) in build.publish_stage(builder.plan).reads
        assert measured is (target == "onnxruntime")
    of_torchscript = seen["torchscript"]
    with_model = {name for name, inputs in of_torchscript.items() if "models/tiny/model.py" in inputs}
    assert with_model == {"train", "to_onnx", "to_torchscript", "select_precision torchscript"}
    assert of_torchscript["to_torchscript"]["GPU"] == "H100"
    made_on = [seen[target]["quantize int8"]["accelerator"] for target in ("onnxruntime", "tensorrt_rtx")]
    assert made_on == ["A100", ""]
    made_for = [seen[target][name]["high precision"] for target in ("onnxruntime", "tensorrt_rtx") for name in GRAPHS]
    assert made_for == ["", "fp32", "", "fp16"]
    assert "package tensorrt" not in seen["onnxruntime"][SELECT]


def test_every_table_of_deploy_toml_is_an_input_of_a_stage(tiny: Path) -> None:
    plans = [plan.build_plan_of(options_of(tiny, target=target)) for target in ("onnxruntime", "tensorrt_rtx")]
    stages = [stage for made in plans for stage in (*build.stages_of(made), build.publish_stage(made))]
    read = {key.partition(".")[0] for stage in stages for key in stage.keys}
    where = "export/pipeline.py: name a new table among the `keys` of the stages that read it"
    assert DeploymentSpec.model_fields.keys() - read == {"tuned"}, where


@pytest.mark.parametrize(("model", "file"), [("minilm", "tokenizer.json"), ("recommender", CATALOGUE)])
def test_publishing_reads_the_tokenizer_or_the_catalogue(model: str, file: str, tiny: Path) -> None:
    reads = build.publish_stage(plan.build_plan_of(options_of(tiny, model=model, models=Path("models")))).reads
    assert [path.parent for path in reads if path.name == file] == [Path("models") / model, tiny / "build" / model]
