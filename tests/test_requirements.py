"""A model folder's `requirements.txt`: installed by the build, never against the lock file, part of the stages' keys."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from deepseek.spec import InputError
from export.dependencies.requirements import install, pinned_versions
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE
from tests.tiny_model import MODEL, TOML


def wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    """Writes a wheel of one module, which has a number `half`."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    requires = f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "half = 0.5\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model that imports the package `halving`; pip finds packages in `wheels/` only."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "deploy.toml").write_text(TOML + '[precision]\ncandidates = ["fp32"]\n')
    code = "import halving\n" + MODEL.format(body="return self.line(x) * halving.half")
    (tmp_path / "models" / "tiny" / "model.py").write_text(code)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "models" / "tiny"


def own_python(folder: Path) -> str:
    """A Python with a site-packages folder of its own, which also has the packages of this one."""
    venv.create(folder, with_pip=False)
    own = next(folder.glob("lib/python3*/site-packages"))
    (own / "all.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    return str(folder / "bin" / "python")


def deepseek(python: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command on the model with that Python."""
    root = folder.parent.parent
    environment = {**os.environ, "DEEPSEEK_BUILD": str(root / "build"), "DEEPSEEK_ENV_FILE": str(root / "env")}
    command = [python, "-m", "cli", *words, "--models", str(folder.parent), "--model", "tiny"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_the_build_installs_the_packages_and_what_is_served_equals_pytorch(folder: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "halving", "1.0")
    python, repository = own_python(tmp_path / "venv"), tmp_path / "repository"
    run = deepseek(python, folder, "to-onnx")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "No module named 'halving'; name its package in" in run.stderr
    assert "tiny/requirements.txt, which `make engine` installs" in run.stderr
    (folder / "requirements.txt").write_text("halving>=1  # halves\n")
    run = deepseek(python, folder, "engine", "--target", "onnxruntime", "--repository", str(repository))
    assert run.returncode == 0, run.stderr
    assert "install   halving>=1, for" in run.stdout
    with EmbeddedServer(repository, **FREE, log_path=tmp_path / "triton.log") as server:
        run = deepseek(python, folder, "parity", "--url", server.grpc_url, "--http-url", server.http_url)
    assert run.returncode == 0, run.stderr


def test_what_is_installed_is_not_installed_again_and_needs_no_network(folder: Path) -> None:
    (folder / "requirements.txt").write_text(
        "pydantic\nhalving; python_version < '3'\nuvicorn[standard]>=99; sys_platform == 'x'\n"
    )
    install(folder)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("numpy<2", "requirements.txt:2: seen numpy<2; requirements.lock has "),
        ("NumPy @ file:///tmp/numpy.whl", "requirements.lock has "),
        ("torch==2.1", f"seen torch==2.1; the build has torch {pinned_versions()['torch']}: allow it or remove it"),
        ("-r others.txt", "seen '-r others.txt'; allowed: a package with its versions, such as timm>=1.0"),
        ("halving==", "seen 'halving=='; allowed"),
        ("\udcff\udcfe", "requirements.txt: not a text in UTF-8; save it in UTF-8"),
        ("absent_package", "requirements.txt: pip cannot install it: Could not find a version"),
        ("oldnumpy", "contradicts requirements.lock or the installed torch, which the build needs: oldnumpy 1.0 depends on numpy<2"),
        ("oldtorch", "oldtorch 1.0 depends on torch==2.1; pinned: torch"),
    ],
)  # fmt: skip
def test_requirements_that_cannot_be_installed_are_one_line(folder: Path, tmp_path: Path, line: str, told: str) -> None:
    wheel(tmp_path / "wheels", "oldnumpy", "1.0", "numpy<2")
    wheel(tmp_path / "wheels", "oldtorch", "1.0", "torch==2.1")
    (folder / "requirements.txt").write_text(f"# what model.py imports\n{line}\n", errors="surrogateescape")
    with pytest.raises(InputError, match=re.escape(told)):
        install(folder)


def test_a_machine_without_a_package_index_is_told_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    (folder / "requirements.txt").write_text("halving\n")
    with pytest.raises(InputError, match=r"reaches no package index; .* -r .*requirements.txt -d wheels, then here"):
        install(folder)


def test_a_folder_without_the_file_calls_no_pip_in_any_environment(folder: Path) -> None:
    (folder / "requirements.txt").unlink(missing_ok=True)
    install(folder, "/nosuch/bin/python")
