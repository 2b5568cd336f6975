"""The sides of a comparison: a repository, one version, or recorded runs; and the layout in which they are served."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.spec import InputError
from deepseek.spec.files.repository import config_path
from loadtests.regression.compared_version import ComparedVersion
from tests.sleeper import write_sleeper


def write_versions(folder: Path) -> Path:
    """A repository of `tiny` with versions 1 and 2; version 1 has a configuration of its own."""
    repository = write_sleeper(folder, 0.002)
    (repository / "tiny" / "2").mkdir()
    (repository / "tiny" / "2" / "model.py").write_text("")
    (repository / "tiny" / "1" / "config.pbtxt").write_text("of version 1")
    return repository


def test_a_version_is_laid_out_alone_with_its_own_configuration(tmp_path: Path) -> None:
    repository = write_versions(tmp_path)
    old = ComparedVersion.of("baseline", "tiny/1", "tiny", repository).lay_out(tmp_path / "base") / "tiny"
    assert sorted(path.name for path in old.iterdir()) == ["1", "config.pbtxt"]
    assert (old / "config.pbtxt").read_text() == "of version 1"
    new = (
        ComparedVersion.of("candidate", str(repository / "tiny" / "2"), "tiny", tmp_path).lay_out(tmp_path / "new")
        / "tiny"
    )
    assert sorted(path.name for path in new.iterdir()) == ["2", "config.pbtxt"]
    assert (new / "config.pbtxt").read_text() == (repository / "tiny" / "config.pbtxt").read_text()
    whole = ComparedVersion.of("candidate", str(repository), "tiny", tmp_path).lay_out(tmp_path / "whole") / "tiny"
    assert sorted(path.name for path in whole.iterdir()) == ["1", "2", "config.pbtxt"]


def test_a_model_and_a_version_may_be_links(tmp_path: Path) -> None:
    repository = write_versions(tmp_path)
    stored = (repository / "tiny").rename(tmp_path / "stored-v7")
    (repository / "tiny").symlink_to(stored)
    (stored / "3").symlink_to((stored / "2").rename(tmp_path / "weights"))
    for version in ("1", "3"):
        laid_out = (
            ComparedVersion.of("candidate", f"tiny/{version}", "tiny", repository).lay_out(tmp_path / version) / "tiny"
        )
        assert sorted(path.name for path in laid_out.iterdir()) == [version, "config.pbtxt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "NEW= is missing; give a model repository"),
        ("tiny/7", r"nor a version in .*repository \(tiny/1, tiny/2\)"),
        ("nowhere", "neither a repository with tiny/config.pbtxt"),
        ("other/1", "a version of other, not of tiny"),
    ],
    ids=["nothing", "no such version", "no such folder", "another model"],
)
def test_a_name_of_no_known_kind_gives_a_one_line_error(tmp_path: Path, given: str, message: str) -> None:
    repository = write_versions(tmp_path)
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "other" / "config.pbtxt").touch()
    with pytest.raises(InputError, match=message) as caught:
        ComparedVersion.of("candidate", given, "tiny", repository)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("common", "version", "takes"),
    [
        ("of 2", 2, "of 2"),
        ("of 2", 1, "of 1"),
        ("of 1", 2, "of 2"),
        ("mine", 2, "mine"),
    ],
    ids=["newest", "older", "interrupted publish", "edited"],
)
def test_a_version_is_served_with_its_own_configuration(tmp_path: Path, common: str, version: int, takes: str) -> None:
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "config.pbtxt").write_text(f"of {number}")
    (tmp_path / "config.pbtxt").write_text(
        common
    )  # "of 1": publishing was killed before it wrote the configuration of 2
    assert config_path(tmp_path, version).read_text() == takes
