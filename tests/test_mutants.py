"""Mutation testing: what is changed, what is not, and what counts as caught."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from deepseek.spec import InputError
from tests.mutants import __main__ as probe
from tests.mutants.mutations import mutants_of, sample

pytestmark = pytest.mark.server


@pytest.mark.parametrize(
    ("line", "mutants"),
    [
        ("y = a <= b is not None", ["y = a < b is not None", "y = a <= b is None"]),
        ("y = a * (b) - c", ["y = a / (b) - c", "y = a * (b) + c"]),
        ("y += 2", ["y -= 2", "y += 3", "y += 1"]),
        ("y = a and not b or é", ["y = a or not b or é", "y = a and b or é", "y = a and not b and é"]),
        ("f(True, 0.5)", ["f(False, 0.5)", "f(True, 1.5)", "f(True, -0.5)"]),
        ("raise ValueError(a + 1)", ["pass"]),
        ("if a: f()", ["if True: f()", "if False: f()"]),
        ("while a: break", ["while False: break", "while a: pass"]),
        ("y = [a for a in b if a]", ["y = [a for a in b if True]", "y = [a for a in b if False]"]),
    ],
)
def test_a_mutant_changes_one_place_of_a_line(line: str, mutants: list[str]) -> None:
    assert [mutant.after for mutant in mutants_of(f"# é\n{line}\n")] == mutants


def test_messages_annotations_and_docstrings_are_not_mutated() -> None:
    source = '"""Text."""\n@d(1)\ndef f(a: int | None) -> g[3]:\n    print(a + 1)\n    y = f"{a + 1:{2}}" + "x"\n'
    assert mutants_of(source) == []


def test_a_sample_stays_the_same_if_another_line_changes() -> None:
    lines = [f"y = a + {number}" for number in range(40)]
    before = sample(mutants_of("\n".join(lines)), 20, seed=1)
    after = sample(mutants_of("\n".join(["import os", *lines])), 20, seed=1)
    assert [mutant.after for mutant in before] == [mutant.after for mutant in after]
    assert sample(mutants_of("\n".join(lines)), 20, seed=2) != before


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout, the current folder, with a module of two functions; one function is tested."""
    shutil.copytree("tests/mutants", tmp_path / "tests" / "mutants")
    (tmp_path / "core.py").write_text("def double(a):\n    return a * 2\n\n\ndef same(a):\n    return a\n")
    (tmp_path / "tests" / "test_core.py").write_text("import core\n\ndef test_it():\n    assert core.double(2) == 4\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    alone\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "MODULES", {"core": (("core.py",), ("tests/test_core.py",))})
    monkeypatch.setattr(probe, "EQUIVALENT", tmp_path / "equivalent.toml")
    row = {"module": "core", "line": "return a * 2", "mutant": "return a * 1", "reason": "an example"}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in row.items())
    (tmp_path / "equivalent.toml").write_text(f"[[equivalent]]\n{text}")
    return tmp_path


def test_the_share_excludes_equivalent_mutants(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mutants", "--count", "99", "--json", "out.json"])
    assert probe.main() == 1
    found = {(row["before"], row["after"]): row["outcome"] for row in json.loads(Path("out.json").read_text())}
    assert found == {
        ("return a * 2", "return None"): "caught",
        ("return a * 2", "return a / 2"): "caught",
        ("return a * 2", "return a * 3"): "caught",
        ("return a * 2", "return a * 1"): "equivalent",
        ("return a", "return None"): "survived",
    }
    assert "survived: core.py:6: return a  ->  return None" in capsys.readouterr().out
    assert (tree / "core.py").read_text().endswith("return a\n")


def test_tests_that_fail_without_a_mutant_are_one_line(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "tests" / "test_core.py").write_text("def test_it():\n    assert False\n")
    monkeypatch.setattr(sys, "argv", ["mutants"])
    with pytest.raises(InputError, match=r"core: tests/test_core.py::test_it fails without a mutant"):
        probe.main()


@pytest.mark.parametrize(
    ("caught", "total", "missed"), [(0, 0, False), (55, 55, False), (42, 55, False), (41, 55, True), (8, 10, False)]
)
def test_a_small_sample_fails_only_if_chance_cannot_explain_its_survivors(
    caught: int, total: int, missed: bool
) -> None:
    outcomes = ["caught"] * caught + ["survived"] * (total - caught) + ["equivalent"] * 3
    assert probe.surely_missed([{"outcome": outcome} for outcome in outcomes]) is missed
