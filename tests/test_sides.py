"""What a comparison is given: a repository, a version of one, or recorded runs; laid out as it is served."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.spec import InputError
from loadtests.sides import Side, side_of
from tests.test_capacity import write_sleeper


def write_versions(folder: Path) -> Path:
    """A repository of `tiny` with versions 1 and 2, of which 1 has a configuration of its own."""
    repository = write_sleeper(folder, 0.002)
    (repository / "tiny" / "2").mkdir()
    (repository / "tiny" / "2" / "model.py").write_text("")
    (repository / "tiny" / "1" / "config.pbtxt").write_text("of version 1")
    return repository


def test_a_version_is_laid_out_alone_with_the_configuration_that_belongs_to_it(tmp_path: Path) -> None:
    repository = write_versions(tmp_path)
    old = side_of("base", "tiny/1", "tiny", repository).lay_out(tmp_path / "base") / "tiny"
    assert sorted(path.name for path in old.iterdir()) == ["1", "config.pbtxt"]
    assert (old / "config.pbtxt").read_text() == "of version 1"
    new = side_of("new", str(repository / "tiny" / "2"), "tiny", tmp_path).lay_out(tmp_path / "new") / "tiny"
    assert sorted(path.name for path in new.iterdir()) == ["2", "config.pbtxt"]
    assert (new / "config.pbtxt").read_text() == (repository / "tiny" / "config.pbtxt").read_text()
    whole = side_of("new", str(repository), "tiny", tmp_path).lay_out(tmp_path / "whole") / "tiny"
    assert sorted(path.name for path in whole.iterdir()) == ["1", "2", "config.pbtxt"]


def test_a_model_and_a_version_may_be_links(tmp_path: Path) -> None:
    repository = write_versions(tmp_path)
    stored = (repository / "tiny").rename(tmp_path / "stored-v7")
    (repository / "tiny").symlink_to(stored)
    (stored / "3").symlink_to((stored / "2").rename(tmp_path / "weights"))
    for version in ("1", "3"):
        laid_out = side_of("new", f"tiny/{version}", "tiny", repository).lay_out(tmp_path / version) / "tiny"
        assert sorted(path.name for path in laid_out.iterdir()) == [version, "config.pbtxt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "NEW= is not given"),
        ("tiny/7", r"nor a version in .*repository \(tiny/1, tiny/2\)"),
        ("nowhere", "neither a repository with tiny/config.pbtxt"),
        ("other/1", "a version of other, not of tiny"),
    ],
    ids=["nothing", "no such version", "no such folder", "another model"],
)
def test_a_side_that_is_nothing_of_the_kind_is_one_clear_line(tmp_path: Path, given: str, message: str) -> None:
    repository = write_versions(tmp_path)
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "other" / "config.pbtxt").touch()
    with pytest.raises(InputError, match=message) as caught:
        side_of("new", given, "tiny", repository)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("common", "version", "takes"),
    [
        ("of 2", None, "of 2"),
        ("of 2", "1", "of 1"),
        ("of 1", None, "of 2"),
        ("of 1", "2", "of 2"),
        ("mine", "2", "mine"),
    ],
    ids=["newest", "older", "cut-off", "cut-off-named", "edited"],
)
def test_a_side_is_served_under_the_configuration_of_its_version(
    tmp_path: Path, common: str, version: str | None, takes: str
) -> None:
    model = tmp_path / "tiny"
    for number in ("1", "2"):
        (model / number).mkdir(parents=True)
        (model / number / "config.pbtxt").write_text(f"of {number}")
    (model / "config.pbtxt").write_text(common)  # "of 1": whoever published 2 was killed before its configuration
    laid_out = Side(name="new", given="b", model=model, version=version).lay_out(tmp_path / "out") / "tiny"
    assert (laid_out / "config.pbtxt").read_text() == takes
    assert sorted(path.name for path in laid_out.iterdir() if path.is_dir()) == ([version] if version else ["1", "2"])
