"""Commands that run other commands: the demo and the release."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli import demo, release
from cli.main import values_of
from cli.table import Command


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """Records the options of the commands that the demo calls; a build of `broken` ends with exit code 2."""
    found: list[argparse.Namespace] = []

    def call(command: Command, options: argparse.Namespace) -> int:
        found.append(argparse.Namespace(**vars(options), name=command.name))
        return 2 if options.__dict__.get("model") == "broken" else 0

    monkeypatch.setattr(demo, "call", call)
    return found


@pytest.mark.parametrize(
    ("words", "target"),
    [((), "onnxruntime"), (("--target", "auto"), "onnxruntime"), (("--target", "torchscript"), "torchscript")],
)
def test_the_demo_builds_and_serves_while_the_steps_run(
    called: list[argparse.Namespace], words: tuple[str, ...], target: str
) -> None:
    demo.main(values_of("demo", "--model", "text", "--duration-s", "3", *words))
    built, served = called
    assert (built.name, built.model, built.target) == ("engine", "text", target)
    assert (served.name, served.command[1:4]) == ("serve", ["-m", "cli", "demo-steps"])
    assert {"--model=text", "--duration-s=3"} <= set(served.command)


def test_a_demo_serves_nothing_if_the_build_fails(called: list[argparse.Namespace]) -> None:
    assert demo.main(values_of("demo", "--model", "broken")) == 2
    assert [each.name for each in called] == ["engine"]


def test_the_demo_runs_all_steps_even_if_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        ran.append(command[3:])
        return SimpleNamespace(returncode={"loadtest": 3, "verdict": 1}.get(command[3], 0))

    monkeypatch.setattr(subprocess, "run", run)
    assert demo.steps(values_of("demo-steps", "--model", "text", "--duration-s", "3")) == 3
    assert [words[0] for words in ran] == ["infer", "parity", "loadtest", "report", "verdict"]
    assert all("--model=text" in words for words in ran)
    assert [words[0] for words in ran if "--duration-s=3" in words] == ["loadtest"]


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Records what a release builds and releases, without doing it."""
    done: list[tuple[str, Any]] = []

    def build(options: argparse.Namespace, publish: bool) -> SimpleNamespace:
        done.append(("build", (options.model, options.precision, publish)))
        return SimpleNamespace(target="tensorrt")

    monkeypatch.setattr(release, "build", build)
    monkeypatch.setattr(release, "release", lambda options: done.append(("release", options.target)))
    return done


def test_a_release_updates_the_build_without_publishing_it(released: list[tuple[str, Any]]) -> None:
    release.main(values_of("release", "--model", "text", "--precision", "int8"))
    assert released == [("build", ("text", "int8", False)), ("release", "tensorrt")]


def test_with_json_a_release_prints_only_its_result_to_standard_output(
    released: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def build(options: argparse.Namespace, publish: bool) -> SimpleNamespace:
        subprocess.run(["echo", "stage"], check=True)
        return SimpleNamespace(target="onnxruntime")

    monkeypatch.setattr(release, "build", build)
    monkeypatch.setattr(release, "release", lambda options: print("result"))
    release.main(values_of("release", "--model", "text", "--json"))
    assert capfd.readouterr() == ("result\n", "stage\n")


def test_a_release_of_another_repository_builds_nothing(released: list[tuple[str, Any]], tmp_path: Path) -> None:
    for version, target in ((2, "onnxruntime"), (10, "torchscript")):
        folder = tmp_path / "text" / str(version)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"target": target}))
    (tmp_path / "text" / "config.pbtxt").touch()
    release.main(values_of("release", "--model", "text", "--new", str(tmp_path)))
    assert released == [("release", "torchscript")]
    told = values_of("rollback", "--model", "text", "--repository", str(tmp_path))
    assert release.published_target(told) == "torchscript"
    for nowhere in ("nowhere", "9" * 400):  # a name that no file can have
        told.repository = tmp_path / nowhere
        assert release.published_target(told) == "onnxruntime"
