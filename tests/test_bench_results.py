"""The benchmarks: parts, goals, files, charts, and the tables of the pages."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from xml.etree import ElementTree

import pytest
import torch

from cli.commands import BY_NAME
from deepseek.spec import InputError
from tests.bench.failure.run import EXPERIMENTS
from tests.bench.publish import PAGES, benchmark_table, filled, main
from tests.bench.results import PUBLISHED, Ratio, Run, merged, read, write
from tests.bench.run import LONGEST_S, PARTS
from tests.bench.setting import Bench, begun_on, chosen, on
from tests.bench.tables import TABLES, Goal
from tests.bench.training import PARTS as TRAINING
from tests.bench.training import low_precision_and_checkpointing
from tests.bench.training_memory import shape
from tests.warm import run_warm

MET = Ratio.of("client p50 over tritonclient: grpc", [1.0, 1.05, 1.2, 1.02, 1.04])
MISSED = Ratio.of("served apart: recommender fp32 over raw", [0.4, 0.5, 0.6], "1.0% refused")
PLAIN = Ratio.of("int8 size over fp32: minilm", [0.65])
BEGAN_ON = len(os.sched_getaffinity(0))  # cores of the process that imports this module
RUN = Run(part="client", date="2026-11-29", cpu="a CPU", int8=("avx512_vnni",), cores=2, ratios=(MET, MISSED, PLAIN))


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
    assert (MISSED.ratio, MISSED.met, MISSED.said) == (0.5, False, "goal: at least 0.6, missed; 1.0% refused")
    assert (PLAIN.quartiles, PLAIN.pairs, PLAIN.met, PLAIN.said) == ((0.65, 0.65), 1, None, "")


def test_a_value_has_the_decimals_of_its_goal() -> None:
    assert (MET.value, Ratio.of("text vectors: smallest cosine", [0.99994]).value) == ("1.04", "0.9999")


def test_a_part_has_a_file_of_its_ratios_and_a_chart(tmp_path: Path) -> None:
    run = Run.here("client", RUN.ratios, took_s=12.3, shortened=True)
    write(run, tmp_path / "bench" / "client.json")
    assert read(tmp_path / "bench" / "client.json") == [run]
    (found,) = json.loads((tmp_path / "bench" / "client.json").read_text())["runs"]
    assert {"date", "cpu", "cores", "commit"} <= found.keys()
    assert "onnxruntime" in found["packages"]
    root = ElementTree.parse(tmp_path / "bench" / "client.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    bars = [(bar.get("class"), float(bar.get("width", ""))) for bar in root.iter(f"{space}rect")]
    assert [css for css, _ in bars] == ["bar", "missed", "bar"]
    assert bars[1][1] / MISSED.ratio == pytest.approx(bars[0][1] / MET.ratio, abs=0.2)  # one scale
    assert len([path for path in root.iter(f"{space}path") if path.get("class") == "goal"]) == 2
    assert any("recommender, fp32, apart" in (text.text or "") for text in root.iter(f"{space}text"))


def test_a_name_stands_for_all_parts_that_begin_with_it() -> None:
    assert chosen("--bench", "client,server", PARTS) == ["client", "server-apart", "server-shared"]
    with pytest.raises(InputError, match="--bench serv,nothing: unknown; allowed: server-apart, "):
        chosen("--bench", "serv,nothing,client", PARTS)
    assert max(part.seconds for part in PARTS.values()) <= LONGEST_S


def test_the_help_of_the_commands_names_every_part() -> None:
    (option,) = (option for option in BY_NAME["bench"].options if option.flag == "--bench")
    named = option.full_help.partition("all): ")[2].partition(";")[0]
    assert sorted(chosen("--bench", named.replace(" ", ""), PARTS)) == sorted(PARTS)
    for name, parts in (("measure-failure", EXPERIMENTS), ("measure-training", TRAINING)):
        (only,) = (option for option in BY_NAME[name].options if option.flag == "--only")
        assert only.choices == tuple(parts)


def test_the_rows_about_a_gpu_measure_what_they_say() -> None:
    rows = low_precision_and_checkpointing(torch.device("cpu"), shape(num_layers=4, max_length=64), rows=8)
    seen = {row.what.strip(): row.seen for row in rows}
    assert [*seen] == ["bf16 on the CPU: speed", "peak of a step", "checkpointing on the CPU: peak of a step", "time"]
    assert seen["peak of a step"].startswith("-")
    assert seen["checkpointing on the CPU: peak of a step"].startswith("-")


# -- the pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_tables_of_a_page_are_those_of_the_published_results(page: Path) -> None:
    assert page.read_text() == filled(page.read_text(), read(PUBLISHED)), "python -m tests.bench.publish"


def test_every_table_is_on_the_page_of_benchmarks() -> None:
    page = Path("docs/benchmarks.md").read_text()
    assert [name for name in TABLES if page.count(f"<!-- bench: {name} -->") != 1] == []


def test_a_new_result_replaces_the_published_one_of_its_key() -> None:
    new = replace(RUN, date="2026-12-01", ratios=(replace(MET, ratio=1.5), replace(PLAIN, key="of no table")))
    kept, added = merged([RUN], [new])
    assert (kept, added) == (replace(RUN, ratios=(MISSED, PLAIN)), replace(new, ratios=new.ratios[:1]))
    assert merged([new], [new]) == [replace(new, ratios=new.ratios[:1])]


def test_a_row_of_a_page_has_goal_result_and_where_it_was_measured() -> None:
    runs = [RUN, Run(part="other", ratios=(Ratio.of("served shared: recommender fp32 over raw", [0.4]),))]
    found = {ratio.key: (ratio, place) for place, run in enumerate(runs) for ratio in run.ratios}
    lines = benchmark_table(TABLES["server"], found, runs)
    assert (
        "| recommender, fp32 | apart | fastest | 0.50 | 0.45 to 0.55 | at least 0.6 | **missed**; 1.0% refused | 1 |"
        in lines
    )
    assert "| recommender, fp32 | shared | fastest | 0.40 |  |  |  | 2 |" in lines
    assert "| MiniLM, fp32 | apart | fastest |  |  | at least 0.95 | not measured yet |  |" in lines
    where = (
        "Run 1: client, 2026-11-29, a CPU (avx512_vnni), 2 cores. Run 2: other, date not recorded, CPU not recorded."
    )
    assert lines[-1] == where


def test_publishing_leaves_out_runs_with_fewer_pairs(
    tmp_path: Path, own_build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = PUBLISHED.read_text()
    monkeypatch.chdir(tmp_path)
    for page in (*PAGES, PUBLISHED):
        page.parent.mkdir(exist_ok=True)
    for page in PAGES:
        page.write_text("Results: <!-- bench: readme -->\nold\n\n## Next\n")
    PUBLISHED.write_text(published)
    write(replace(RUN, shortened=True), tmp_path / "build" / "bench" / "int8.json")
    (tmp_path / "build" / "bench" / "peers.json").write_text("{}")
    (tmp_path / "build" / "bench" / "peer.json").write_text('{"ratios": []}')  # of an older version
    main()
    assert PUBLISHED.read_text() == published
    write(RUN, tmp_path / "build" / "bench" / "client.json")
    main()
    assert read(PUBLISHED)[-1] == RUN
    assert "| 1.04 over gRPC, " in PAGES[1].read_text()
    assert PAGES[1].read_text().endswith("|\n\n## Next\n")
    assert "skipped" in capsys.readouterr().out


@pytest.mark.server
def test_a_command_has_the_cores_of_the_part_that_starts_it(tmp_path: Path) -> None:
    (tmp_path / "cores.py").write_text("import os; print(sorted(os.sched_getaffinity(0)))")
    every = sorted(os.sched_getaffinity(0))
    for cores in (every[:1], every):
        with on(cores):
            assert run_warm(["cores"], dict(os.environ), tmp_path).stdout == f"{cores}\n"


@pytest.mark.server
def test_a_part_with_the_generator_apart_begins_on_the_cores_of_the_server() -> None:
    bench = cast(Bench, SimpleNamespace(results=[MET], shortened=False))
    (core, *_) = sorted(os.sched_getaffinity(0))
    begun_on([core], _cores_at_import, bench, MISSED.key)
    assert [result.ratio for result in bench.results] == [MET.ratio, 1]
    assert core in os.sched_getaffinity(0)


def _cores_at_import(bench: Bench, key: str) -> None:
    bench.results.append(Ratio.of(key, [BEGAN_ON]))
