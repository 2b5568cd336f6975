"""The set-up of the virtual environment: done once, completed if killed, with progress output."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli import environment
from cli.environment import SetUpError, find_python, missing, remove_partial, set_up, shown_of, stamp

QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
WHOLE = """
import importlib.metadata as m
files = m.files('pip')
assert all(file.locate().exists() for file in files)
assert {file.name for file in files} >= {'pip', 'INSTALLER'}
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The recorded arguments of pip; no environment is made, and no index is queried."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(environment, "pip", lambda venv, *words, **pins: calls.append((*words, *pins.values())))
    monkeypatch.setattr(environment, "make_environment", lambda venv, python=None: None)
    monkeypatch.setattr(environment, "version_of", lambda venv: "Python 3.11")
    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    monkeypatch.setattr(environment, "has_system", lambda: True)
    monkeypatch.setenv("TORCH_CPU_INDEX", "http://127.0.0.1:9")
    return calls


def test_a_need_is_set_up_again_only_if_its_sources_change(
    tmp_path: Path, installed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up(tmp_path, ["test", "checkov", "system"])
    assert [words[0] for words in installed] == ["-e", "--no-deps", "--no-deps"]
    assert installed[0][1].endswith("[train,export,loadtest,gateway,openai,cpu,rtx,test,docs]")
    assert installed[2][-1] is None  # checkov's lock conflicts with the project's
    assert missing(tmp_path, list(environment.NEEDS)) == ["rtx", "tensorrt"]
    set_up(tmp_path, ["test", "checkov", "system"])
    assert len(installed) == 3
    monkeypatch.setattr(environment, "TRITON_WHEEL", "nvidia-pytriton==0.7.1")
    set_up(tmp_path, [])
    assert installed[-1] == ("--no-deps", "nvidia-pytriton==0.7.1")
    assert missing(tmp_path, ["base", "test"]) == ["test"]


def test_a_moved_clone_is_set_up_again(
    tmp_path: Path, installed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in environment.SOURCES:
        (tmp_path / "clone" / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "clone" / source)
    monkeypatch.setattr(environment, "ROOT", tmp_path / "clone")
    set_up(tmp_path / "venv", [])
    assert missing(tmp_path / "venv", ["base"]) == []
    monkeypatch.setattr(environment, "ROOT", (tmp_path / "clone").rename(tmp_path / "moved"))
    assert missing(tmp_path / "venv", ["base"]) == ["base"]


def test_with_a_gpu_torch_is_the_cuda_build(
    tmp_path: Path, installed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    set_up(tmp_path, ["rtx"])
    assert installed[0][1].endswith("[train,export,loadtest,gateway,openai,gpu,rtx]")


def test_an_environment_stays_for_the_cpu_and_a_note_says_so(
    tmp_path: Path,
    installed: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    packages, devices = tmp_path / "venv" / "lib" / "python3.12" / "site-packages", tmp_path / "dev"
    (packages / "onnxruntime-1.32.0.dist-info").mkdir(parents=True)
    devices.mkdir()
    monkeypatch.setattr(environment.shutil, "which", lambda program: program)
    environment.note_gpu(tmp_path / "venv", devices)
    (devices / "nvidia0").touch()
    with monkeypatch.context() as without_smi:  # the set-up would see no GPU again
        without_smi.setattr(environment.shutil, "which", lambda program: None)
        environment.note_gpu(tmp_path / "venv", devices)
    assert capsys.readouterr().err == ""
    environment.note_gpu(tmp_path / "venv", devices)
    assert f"note: {tmp_path}/venv was made without a GPU" in capsys.readouterr().err
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    set_up(tmp_path / "venv", ["rtx"])  # the other build of ONNX Runtime would overwrite parts of this one
    assert installed[0][1].endswith("gateway,openai,cpu,rtx]")
    (packages / "onnxruntime_gpu-1.31.1.dist-info").mkdir()
    capsys.readouterr()
    environment.note_gpu(tmp_path / "venv", devices)
    assert capsys.readouterr().err == ""


def test_without_a_gpu_torch_comes_from_the_index_of_cpu_builds(
    tmp_path: Path,
    installed: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up(tmp_path, [])
    monkeypatch.setenv("TORCH_CPU_INDEX", "/srv/wheels")  # no URL
    stamp(tmp_path, "base").unlink()
    set_up(tmp_path, [])
    told = capsys.readouterr().err
    assert all(f"no CPU build of PyTorch from {index} (" in told for index in ("http://127.0.0.1:9", "/srv/wheels"))
    (tmp_path / "torch").mkdir()
    monkeypatch.setenv("TORCH_CPU_INDEX", f"file://{tmp_path}")
    monkeypatch.setattr(environment.urllib.request, "urlopen", lambda url, timeout: io.BytesIO())
    stamp(tmp_path, "base").unlink()
    set_up(tmp_path, [])
    assert installed[4] == ("--index-url", f"file://{tmp_path}", "torch>=2.9,<3")


def test_a_failed_need_has_no_stamp(
    tmp_path: Path,
    installed: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(environment, "has_system", lambda: False)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)  # no apt-get
    set_up(tmp_path, ["system"])
    assert "note: tests of the gateway, the alerts or the manifests will be skipped" in capsys.readouterr().err
    assert missing(tmp_path, ["base", "system"]) == ["system"]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("  Downloading numpy-2.3-cp311.whl (16.6 MB)\n", ("download", "numpy-2.3-cp311.whl (16.6 MB)")),
        ("Downloading https://x.org/a/torch-2.9.whl (184 MB)\n", ("download", "torch-2.9.whl (184 MB)")),
        ("  Downloading numpy-2.3-cp311.whl.metadata (62 kB)\n", None),
        ("Installing collected packages: a, b, c\n", ("install", "3 packages")),
        ("Requirement already satisfied: rich in .venv\n", None),
    ],
)
def test_downloads_are_shown_with_their_sizes(line: str, shown: tuple[str, str] | None) -> None:
    assert shown_of(line) == shown


def test_an_unsupported_python_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_python()
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(old))
    with pytest.raises(SetUpError, match=rf"PYTHON: seen '{old}'; allowed: one that is 3.11 to 3.13 and can"):
        find_python()
    monkeypatch.delenv("PYTHON")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetUpError, match=r"no Python on PATH that is 3\.11 to 3\.13"):
        find_python()


def test_a_python_without_its_shared_library_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    static = tmp_path / "python3"
    static.write_text('#!/bin/sh\ncase "$1" in */libpython.py) exit 1;; esac\n')
    static.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetUpError, match=r"python3 has no shared library .* apt-get install python3-dev"):
        find_python()
    shutil.copy("/bin/true", tmp_path / "python3.12")
    assert find_python() == "python3.12"


def test_an_unknown_need_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert environment.main(["--venv", str(tmp_path), "tests"]) == 2
    assert capsys.readouterr().err.startswith("error: seen 'tests'; a need is one of base, rtx, tensorrt, test")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert environment.main(["--venv", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists; --venv names another folder\n"


def test_a_package_whose_installation_was_killed_is_installed_again(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, record in (("whole", "whole/INSTALLER,,\n"), ("torn", "torn/__init__.py,,\n"), ("bare", None)):
        (site / f"{name}-1.0.dist-info").mkdir(parents=True)
        if record is not None:
            (site / f"{name}-1.0.dist-info" / "RECORD").write_text(record)
    remove_partial(tmp_path)
    assert [path.name for path in site.iterdir()] == ["whole-1.0.dist-info"]


OFFLINE = """
import sys
from pathlib import Path
from cli import environment
environment.pip = lambda venv, *words: print("pip", *words, flush=True)
sys.exit(environment.main(["--venv", sys.argv[1]]))
"""


def start(venv: Path, **options: Any) -> subprocess.Popen[str]:
    """Starts a set-up that installs no packages."""
    line = [sys.executable, "-c", OFFLINE, str(venv)]
    return subprocess.Popen(line, env={**os.environ, "TORCH_CPU_INDEX": "http://127.0.0.1:9"}, text=True, **options)


def test_a_killed_set_up_keeps_the_lock_until_its_pip_ends(tmp_path: Path) -> None:
    own = tmp_path / "bin" / "python"
    own.parent.mkdir()
    installs = f"touch {tmp_path}/began; while [ -e {tmp_path}/began ]; do sleep 0.1; done"
    own.write_text(f'#!/bin/sh\ncase "$*" in *install*) {installs};; esac\n')
    own.chmod(0o755)
    line = [sys.executable, "-m", "cli.environment", "--venv", str(tmp_path)]
    with subprocess.Popen(line, env={**os.environ, "TORCH_CPU_INDEX": "http://127.0.0.1:9"}, **QUIET) as process:
        while not (tmp_path / "began").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        (tmp_path / "began").unlink()  # pip ends
    fcntl.flock(folder, fcntl.LOCK_EX)
    os.close(folder)


@pytest.mark.slow
@pytest.mark.parametrize("made", ["bin/python", "pip/_vendor", "pip-*-info", "pip-*-info/RECORD"])
def test_a_killed_set_up_is_completed_by_the_next(tmp_path: Path, made: str) -> None:
    venv = tmp_path / "environment"
    process = start(venv, start_new_session=True, **QUIET)
    while not any(list(venv.glob(place)) for place in (made, f"lib/*/site-packages/{made}")):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert start(venv, **QUIET).wait() == 0
    for check in (("-c", WHOLE), ("-m", "pip", "check")):
        subprocess.run([venv / "bin" / "python", *check], check=True, **QUIET)


@pytest.mark.slow
def test_of_two_concurrent_set_ups_one_waits(tmp_path: Path) -> None:
    both = [start(tmp_path / "environment", stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    told = "".join(each.communicate()[0] for each in both)
    assert [each.returncode for each in both] == [0, 0]
    assert told.count("setup     ") == 1 + told.count("no CPU build")
    assert told.count("pip -e ") == 1
