"""Runs of a build: what `--explain` says, what a kill or a failed stage leaves, how builds share a folder, `clean`."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from unittest.mock import Mock

import pytest

from deepseek.spec import InputError
from deepseek.spec.files.folders import alone_in
from export import build, cache, clean
from export.artifact import last_options, weights_path
from export.pipeline import Stage
from serving.stack.write_env_file import OWN, WRITTEN
from tests.test_pipeline import CHOSEN, DEPLOY, GRAPHS, MEASURE, SELECT, Run, engine, options_of, tiny

__all__ = ["engine", "tiny"]  # fixtures


def test_explain_names_the_input_and_builds_nothing(
    engine: Run, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine()
    (tiny / "models" / "tiny" / "deploy.toml").write_text(DEPLOY + "[precision]\nmax_drop = 0.02\n")
    capsys.readouterr()
    build.main(options_of(tiny, explain=True))
    said = capsys.readouterr().out.splitlines()[:5]
    assert said[:3] == [f"{name:<28} up to date" for name in ("train", "to_onnx", "quantize fp16")]
    assert said[3] == f"{'quantize int8':<28} rebuild: deploy.toml precision.max_drop changed from 0.01 to 0.02"
    assert said[4] == f"{SELECT:<28} rebuild: quantize int8 is rebuilt"
    assert engine() == ["quantize int8", *CHOSEN]
    (tiny / "models" / "tiny" / "deploy.toml").write_text(
        DEPLOY + "[precision]\nmax_drop = 0.02\ncandidates = ['fp16']\n"
    )
    build.main(options_of(tiny, explain=True))
    assert f"{SELECT:<28} rebuild: deploy.toml precision.candidates changed from " in capsys.readouterr().out


def test_explain_reports_what_comes_from_the_cache(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = build.Builder(build.build_plan_of(options_of(tiny)))
    train, to_onnx = list(build.stages_of(builder.plan))[:2]
    files = tiny / "made"
    files.mkdir()
    (files / train.writes[0].name).write_text("weights")
    cache.store(builder.keys(train)[""], files)
    builder.inputs.foreseen[train.writes[0]] = cache.sha256(files / train.writes[0].name)
    for name in ("model.onnx", "model.onnx.data", "other.json"):
        (files / name).write_text(name)
    cache.store(builder.keys(to_onnx)[""], files)
    explained = build.Builder(builder.plan)
    explained.explain([train, to_onnx])
    graphs = {path.name for path in explained.inputs.foreseen if path.parent == to_onnx.writes[-1].parent}
    assert graphs == {"model.onnx", "model.onnx.data"}  # and no other file of the entry
    told = [line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines()]
    missing = "from the cache: tiny/weights-digest.json is missing"
    assert told == [missing, "from the cache: train is rebuilt"]


def test_the_outputs_of_a_killed_stage_and_changed_or_removed_ones_are_rebuilt(
    engine: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine()
    deploy = tiny / "models" / "tiny" / "deploy.toml"
    deploy.write_text(DEPLOY + "[precision]\nmax_drop = 0.02\n")
    with monkeypatch.context() as patch:

        def killed(builder: build.Builder, stage: Stage, lock: int) -> None:
            stage.beside[0].write_text("half of another")
            raise KeyboardInterrupt

        patch.setattr(build.Builder, "_execute", killed)
        with pytest.raises(KeyboardInterrupt):
            build.build(options_of(tiny))
    deploy.write_text(DEPLOY)  # back again: inputs and graph are as before, the manifest is not
    assert engine() == ["quantize int8", SELECT, MEASURE, "publish"]
    (tiny / "build" / "tiny" / "fp16" / "model.onnx").write_text("by hand")
    (tiny / "build" / "tiny" / "int8" / "manifest.json").unlink()
    assert engine() == [*GRAPHS, SELECT, MEASURE, "publish"]


def test_check_engine_keeps_data_and_pruning_of_the_last_build(engine: Run, tiny: Path) -> None:
    clicks = tiny / "clicks.csv"
    clicks.write_text("1,2,3")
    engine(prune=0.25, data=str(clicks))
    build.build_graphs(build.build_plan_of(options_of(tiny, target="tensorrt_rtx")), ["int8"])
    assert engine(prune=0.25, data=str(clicks)) == ["quantize int8", SELECT, MEASURE, "publish"]  # made for TensorRT


def test_a_second_build_of_a_folder_waits_and_so_does_clean(
    engine: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine()
    graph = tiny / "build" / "tiny" / "fp16" / "model.onnx"
    said: SimpleQueue[str] = SimpleQueue()
    monkeypatch.setattr("deepseek.spec.files.folders.print", lambda text, **_: said.put(text), raising=False)
    for command, left in ((engine, True), (lambda: clean.main(options_of(tiny)), False)):
        other = threading.Thread(target=command)
        with alone_in(tiny / "build" / "tiny"):
            other.start()
            assert "waiting for another process" in said.get()
            assert graph.exists()
        other.join()
        assert graph.exists() is left


def test_distclean_does_not_hold_the_gateways_folder_while_it_waits_for_a_build(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gateway", "tiny"):
        (tiny / "build" / name).mkdir(parents=True, exist_ok=True)
    glob, said = Path.glob, SimpleQueue[str]()
    monkeypatch.setattr(Path, "glob", lambda place, pattern: iter(sorted(glob(place, pattern))))
    monkeypatch.setattr("deepseek.spec.files.folders.print", lambda text, **_: said.put(text), raising=False)
    other = threading.Thread(target=clean.everything, args=(options_of(tiny),))
    with alone_in(tiny / "build" / "tiny"):
        other.start()
        assert said.get().endswith("/tiny")
        with alone_in(tiny / "build" / "gateway", refusal="the build would wait for distclean, and that for the build"):
            pass
    other.join()
    assert not (tiny / "build").exists()


def test_a_build_that_waited_for_clean_locks_the_new_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, locked = tiny / "build" / "tiny", list[int]()

    def replaced(lock: int, _: int) -> None:
        """The first lock is of a folder that `clean` removes and another build makes again."""
        if not locked:
            folder.rename(tiny / "removed")
            folder.mkdir()
        locked.append(os.fstat(lock).st_ino)

    monkeypatch.setattr("fcntl.flock", replaced)
    with alone_in(folder):
        assert locked == [(tiny / "removed").stat().st_ino, folder.stat().st_ino]


def test_clean_says_that_a_model_has_nothing_to_remove(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "repository" / "tiny").mkdir(parents=True)
    clean.main(options_of(tiny))
    assert not (tiny / "repository" / "tiny").exists()
    clean.main(options_of(tiny, model="typo"))
    assert re.fullmatch(r"clean     no \S+/repository/typo and no \S*typo\n", capsys.readouterr().out)


def test_clean_fails_if_it_cannot_remove_the_files_of_another_user(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny / "repository" / "tiny"
    folder.mkdir(parents=True)
    monkeypatch.setattr("os.rmdir", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", str(folder))))
    with pytest.raises(PermissionError):
        clean.main(options_of(tiny))


def test_clean_keeps_the_users_own_lines_and_choices(tiny: Path) -> None:
    env, ours, yours, port = tiny / "env", f"{WRITTEN}\nA=1\n", f"{OWN}\n", "GATEWAY_PORT=9443\n"
    own = f"{yours}MINE=1\n"
    cases = [(ours + own, own), (ours + yours, None), (ours, None), ("MINE=1\n", "MINE=1\n")]
    for before, after in (*cases, (ours + port + yours, port + yours)):
        env.write_text(before)
        clean.main(options_of(tiny))
        assert (env.read_text() if env.exists() else None) == after
    (tiny / "repository" / "another").mkdir(parents=True)
    (tiny / "repository" / "another" / "config.pbtxt").touch()
    env.write_text(ours + yours)
    clean.main(options_of(tiny))
    assert env.read_text() == ours + yours  # the stack still serves another model


@pytest.mark.parametrize("setting", ["STACK_REPOSITORY", "STACK_BUILD"])
def test_a_build_or_clean_elsewhere_leaves_the_env_file_of_the_stack(
    setting: str, engine: Run, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = f"{WRITTEN}\n{setting}='{tiny}/of the stack'\n{OWN}\n"
    (tiny / "env").write_text(before)
    (tiny / "of the stack").mkdir()
    assert "stack" not in engine()
    assert f"/env is unchanged: its stack has {setting}={tiny}/of the stack; make stack" in capsys.readouterr().out
    clean.main(options_of(tiny))
    assert (tiny / "env").read_text() == before
    (tiny / "of the stack").rmdir()  # the clone was moved
    assert "stack" in engine()


def test_a_build_that_does_nothing_loads_neither_torch_nor_numpy(engine: Run, tiny: Path) -> None:
    engine()
    where = (f"--models={tiny}/models", f"--repository={tiny}/repository", f"--env-file={tiny}/env")
    program = "import sys; from cli.main import main; assert main() == 0; print({'torch', 'numpy', 'onnx'} & set(sys.modules))"
    flags = ("engine", "--model", "tiny", *where, "--target", "onnxruntime", "--explain")
    environment = {**os.environ, "PYTHONPATH": f".:{tiny}/elsewhere"}
    run = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, env=environment)
    assert run.stdout.splitlines()[-1] == "set()", run.stderr
    assert run.stdout.count("up to date") == 8, run.stdout


@pytest.mark.parametrize(
    ("code", "expected"),
    [("sys.exit(1)", 1), ("sys.exit(2)", 2), ("os.kill(os.getpid(), 15)", 143)],
)
def test_a_failed_stage_ends_the_build_with_its_exit_code(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: int
) -> None:
    monkeypatch.setattr(build.Builder, "command", lambda *_: [sys.executable, "-c", f"import os, sys; {code}"])
    with pytest.raises(SystemExit) as caught:
        build.build(options_of(tiny), publish=False)
    assert caught.value.code == expected


def test_a_build_whose_training_fails_leaves_the_data_of_the_last_one(
    engine: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good.csv", "bad.csv"):
        (tiny / name).write_text(name)
    engine(data=str(tiny / "good.csv"))
    monkeypatch.setattr(build.Builder, "_execute", Mock(side_effect=SystemExit(2)))
    with pytest.raises(SystemExit):
        engine(data=str(tiny / "bad.csv"))
    assert last_options("tiny")["data"] == str(tiny / "good.csv")


@pytest.mark.parametrize("built_before", [False, True])
def test_a_stage_that_ends_without_its_files_ends_the_build(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, built_before: bool
) -> None:
    if built_before:
        weights_path("tiny").parent.mkdir(parents=True)
        weights_path("tiny").write_text("{}")
    monkeypatch.setattr(build.Builder, "command", lambda *_: [sys.executable, "-c", "import os; os._exit(0)"])
    with pytest.raises(InputError, match=r"^train ended with exit code 0, but did not write tiny/weights"):
        build.build(options_of(tiny), publish=False)
