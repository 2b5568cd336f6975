"""The benchmarks' ratios: goals, files and charts."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.results import Goal, Ratio, chart, write
from tests.conftest import run_module

MET = Ratio.of("client p50 over bare tritonclient, grpc", [1.0, 1.05, 1.2, 1.02, 1.04], Goal(most=1.1), "")
MISSED = Ratio.of("served < raw", [0.4, 0.5, 0.6], Goal(least=0.6), "load apart")
PLAIN = Ratio.of("size of int8 over fp32", [0.65], None, "")


@pytest.mark.parametrize(
    ("goal", "said", "met", "missed"),
    [
        (Goal(least=0.9), "at least 0.9", 0.9, 0.89),
        (Goal(most=1.1), "at most 1.1", 1.1, 1.11),
        (Goal(0.98, 1.02), "0.98 to 1.02", 1.0, 1.03),
        (Goal(0.98, 1.02), "0.98 to 1.02", 0.98, 0.97),
    ],
)
def test_a_goal_has_one_bound_or_two(goal: Goal, said: str, met: float, missed: float) -> None:
    assert (str(goal), goal.met(met), goal.met(missed)) == (said, True, False)


def test_a_ratio_is_the_median_of_its_pairs_with_their_quartiles() -> None:
    assert (MET.ratio, MET.quartiles, MET.pairs, MET.met) == (1.04, (1.02, 1.05), 5, True)
    assert (MISSED.ratio, MISSED.met, MISSED.said) == (0.5, False, "goal: at least 0.6, missed; load apart")
    assert (PLAIN.quartiles, PLAIN.pairs, PLAIN.met, PLAIN.said) == ((0.65, 0.65), 1, None, "")


def test_a_part_has_a_file_of_its_ratios_and_a_chart(tmp_path: Path) -> None:
    write([MET, MISSED, PLAIN], tmp_path / "bench" / "client.json")
    found = json.loads((tmp_path / "bench" / "client.json").read_text())
    assert [each["met"] for each in found["ratios"]] == [True, False, None]
    assert found["ratios"][0]["goal"] == {"least": None, "most": 1.1}
    assert (tmp_path / "bench" / "client.svg").read_text() == chart([MET, MISSED, PLAIN], "client")


def test_a_chart_draws_bar_whisker_and_goal_on_one_scale() -> None:
    root = ElementTree.fromstring(chart([MET, MISSED, PLAIN], "client"))
    space = "{http://www.w3.org/2000/svg}"
    bars = [(bar.get("class"), float(bar.get("width", ""))) for bar in root.iter(f"{space}rect")]
    assert [css for css, _ in bars] == ["bar", "missed", "bar"]
    scale = bars[0][1] / MET.ratio
    assert bars[1][1] == pytest.approx(scale * MISSED.ratio, abs=0.1)
    goals = [path.get("d", "") for path in root.iter(f"{space}path") if path.get("class") == "goal"]
    left = float(root.find(f"{space}rect").get("x", ""))  # type: ignore[union-attr]
    assert [float(goal[1:].split()[0]) for goal in goals] == pytest.approx(
        [left + scale * 1.1, left + scale * 0.6], abs=0.1
    )
    assert any("served < raw" in (text.text or "") for text in root.iter(f"{space}text"))


def test_an_unknown_part_is_refused() -> None:
    run = run_module("tests.bench", "--parts", "server,nothing")
    assert (run.returncode, run.stderr) == (
        2, "error: --parts nothing: no such part; allowed: server, engine, client, generator, capacity, tuned, text\n"
    )  # fmt: skip
