"""What the wheel's Triton needs of this machine: libraries and a Python that its stubs find."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deepseek.spec import InputError
from serving.embedded import wheel


def test_a_stub_that_needs_libpython_gets_this_interpreters_and_the_users_libraries_are_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = tmp_path / f"libpython3-1.{sys.version_info.minor}.so.1.0"
    bundled.touch()
    monkeypatch.setattr(wheel, "libpython", lambda: None)
    with pytest.raises(InputError, match=r"needs the shared library of Python .*apt-get install python3-dev"):
        wheel.environment(tmp_path, tmp_path)
    monkeypatch.setattr(wheel, "libpython", lambda: tmp_path / "libpython.so")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/cuda/lib64")
    first, *_, last = wheel.environment(tmp_path, tmp_path)["LD_LIBRARY_PATH"].split(":")
    assert (Path(first) / bundled.name).readlink() == tmp_path / "libpython.so"
    assert last == "/usr/local/cuda/lib64"


def test_the_stub_finds_its_packages_by_an_ascii_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own := tmp_path / "Téléchargements" / "bin").mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    first = wheel.environment(tmp_path / "none", tmp_path)["PATH"].split(":")[0]
    assert first.isascii()
    assert Path(first).samefile(own)
