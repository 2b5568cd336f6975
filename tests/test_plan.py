"""The plan of a build: its target, and where TensorRT compiles."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek.spec import InputError
from export import build, pipeline, plan
from tests.test_pipeline import Run, engine, options_of, tiny

__all__ = ["engine", "tiny"]  # fixtures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nosuch"}, "no model 'nosuch'"),
        ({"target": "torchscript", "precision": "int8"}, "target torchscript has fp32 only"),
        ({"target": "tensorrt"}, "TARGET=tensorrt: this machine lacks an NVIDIA GPU"),
    ],
)
def test_an_impossible_build_fails_in_one_line_before_it_starts(
    tiny: Path, options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "missing_for_container", lambda: ["an NVIDIA GPU"])
    with pytest.raises(InputError, match=message):
        build.build(options_of(tiny, **options))
    assert not (tiny / "build").exists()


@pytest.mark.parametrize(
    ("gpu", "missing", "native", "inside", "target", "why"),
    [
        ("", ["a GPU", "Docker"], False, False, "onnxruntime", "a GPU"),
        ("L4", ["Docker"], False, False, "onnxruntime", "Docker"),
        ("L4", [], False, False, "tensorrt", ""),
        ("L4", ["Docker"], True, False, "tensorrt", ""),
        ("L4", ["Docker"], False, True, "tensorrt", ""),
        ("", ["a GPU"], True, False, "onnxruntime", "a GPU"),
    ],
)
def test_the_auto_target_is_tensorrt_if_this_machine_can_compile_and_else_says_why_not(
    monkeypatch: pytest.MonkeyPatch, gpu: str, missing: list[str], native: bool, inside: bool, target: str, why: str
) -> None:
    monkeypatch.setattr(plan, "gpu", lambda: gpu)
    monkeypatch.setattr(plan, "missing_for_container", lambda: missing)
    monkeypatch.setattr(plan, "inside_container", lambda tag: inside)
    compiler = plan.compiler_of(native, "26.10")
    assert plan.resolved_target("auto", compiler) == (target, f"this machine lacks {why}" if why else "")
    assert plan.resolved_target("torchscript", compiler) == ("torchscript", "")


def test_a_build_with_the_auto_target_prints_why_it_is_not_for_tensorrt(
    engine: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "missing_for_container", lambda: ["Docker (no docker on PATH)"])
    engine(target="auto")
    told = "engine    target onnxruntime, not tensorrt: this machine lacks Docker (no docker on PATH)"
    assert capsys.readouterr().out.splitlines().count(told) == 1


@pytest.mark.parametrize(
    ("compiler", "command"),
    [
        ("container", ["tensorrt-container", "--tag", "26.08", "--models", "MODELS", "--"]),
        ("inside", ["to-tensorrt"]),
        ("native", ["to-tensorrt"]),
    ],
)
def test_tensorrt_runs_in_the_container_inside_it_or_natively(
    tiny: Path, compiler: plan.Compiler, command: list[str]
) -> None:
    asked = plan.build_plan_of(options_of(tiny, triton_tag="26.08"))
    builder = build.Builder(replace(asked, target="tensorrt", compiler=compiler))
    stages = {stage.name: stage for stage in build.stages_of(builder.plan)}
    python = "/opt/export/bin/python" if compiler == "inside" else sys.executable
    expected = [python, "-m", "cli", *(word.replace("MODELS", str(tiny / "models")) for word in command)]
    assert builder.command(stages["to_tensorrt fp16"])[: len(expected)] == expected
    assert builder.command(stages["quantize fp16"])[:4] == [sys.executable, "-m", "cli", "quantize"]


def test_an_engine_is_rebuilt_if_another_tensorrt_would_build_it(tiny: Path) -> None:
    asked = plan.build_plan_of(options_of(tiny))
    found = set()
    cases: list[tuple[plan.Compiler, str]] = [("container", "26.10"), ("container", "26.11"), ("native", "26.10")]
    cases.append(("inside", "26.10"))
    for compiler, tag in cases:
        builder = build.Builder(replace(asked, target="tensorrt", compiler=compiler, triton_tag=tag))
        stage = next(stage for stage in build.stages_of(builder.plan) if stage.name == "to_tensorrt fp16")
        found.add(builder.keys(stage)[""])
    assert len(found) == 4


@pytest.mark.parametrize(
    ("compiler", "given", "named"), [("", None, ""), ("", "26.09", "26.09"), ("container", None, "26.08")]
)
def test_only_an_engine_of_tensorrt_changes_the_release_of_the_stack(
    tiny: Path, compiler: plan.Compiler, given: str | None, named: str
) -> None:
    options = options_of(tiny, triton_tag=given)
    asked = replace(plan.build_plan_of(options), compiler=compiler, triton_tag=named or "26.10")
    command = pipeline.stack_stage(asked, options).command
    assert command[command.index("--triton-tag") + 1 :][:1] == (named,) if named else "--triton-tag" not in command
