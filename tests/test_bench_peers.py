"""`make bench-peers`: the table of peers, the arithmetic of its results, and its goals. No test installs or starts a peer."""

from __future__ import annotations

import asyncio
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from cli.commands import BY_NAME
from tests.bench.peers.load import Load, _body
from tests.bench.peers.raw import padded
from tests.bench.peers.report import Result, Run, goals, p99_chart, table, throughput_chart
from tests.bench.peers.table import AUTO, HERE, IDS, PEERS, RECOMMENDER, WORKLOADS
from tests.bench.peers.workloads import _other_items, _turned

WORDS = dict.fromkeys(
    ("folder", "port", "port2", "port3", "port4", "port5", "cores", "workload", "model", "scratch"), "x"
)


def load(per_s: float, p99_ms: float, failed: float = 0) -> Load:
    return Load(answered_per_s=per_s, failed=failed, p99_ms=30_000 if failed else p99_ms, answered_p99_ms=p99_ms)


def result(
    workload: str, server: str, closed: list[Load], at_50: list[Load | None], at_70: list[Load | None]
) -> Result:
    """On a machine where raw answers 100/s."""
    raw = [100.0] * len(closed)
    rates = [50.0, 70.0]
    return Result(workload=workload, server=server, rates=rates, raw_per_s=raw, closed=closed, open=[at_50, at_70])


@pytest.fixture
def run() -> Run:
    ours = result(IDS, "ours-fp32", [load(91, 300), load(95, 320)], [load(50, 60)] * 2, [load(70, 90), load(70, 110)])
    triton = result(IDS, "triton", [load(95, 400), load(93, 500)], [load(50, 80)] * 2, [load(70, 200), load(70, 100)])
    slow = result(IDS, "fastapi", [load(60, 800, 0.02)] * 2, [load(50, 50)] * 2, [None, None])
    broken = Result(workload=IDS, server="litserve", rates=[50.0, 70.0], why="it did not start")
    return Run(apart=False, where="here", rounds=2, duration_s=4, results=[ours, triton, slow, broken])


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_its_settings_in_a_folder_and_pinned(name: str) -> None:
    peer = PEERS[name]
    requirements = (HERE / peer.folder / "requirements.txt").read_text()
    assert re.search(r"^[^#\n]+==\d", requirements, re.M)
    for text in (peer.command, peer.threads, *peer.settings.values()):
        text.format(**WORDS)
    assert set(peer.workloads) <= set(WORKLOADS)


def test_the_commands_help_names_every_peer_and_workload() -> None:
    helps = {option.flag: option.help for option in BY_NAME["bench-peers"].options}
    assert all(re.search(rf"[ ,:]{name}\b", helps["--peers"]) for name in PEERS)
    assert all(name in helps["--workloads"] for name in WORKLOADS)


def test_the_table_says_why_a_peer_has_no_figures(run: Run) -> None:
    lines = table(Run.of_json(run.to_json())).splitlines()
    assert run.of(IDS).keys() == {"ours-fp32", "triton", "fastapi"}
    assert lines[0].endswith("; here; 50 % and 70 % of raw are 50 and 70 requests/s.")
    assert lines[4:] == [
        "| this project, fp32 | 0.93 (0.91 to 0.95) | 310 (300 to 320) | 60 (60 to 60) | 100 (90 to 110) | 0.0% |",
        "| Triton, customary configuration | 0.94 (0.93 to 0.95) | 450 (400 to 500) | 80 (80 to 80) | 150 (100 to 200) | 0.0% |",
        "| FastAPI, without batching | 0.60 (0.60 to 0.60) | 800 (800 to 800) | 50 (50 to 50) | cannot keep up | 2.0% |",
        "| LitServe | not measured: it did not start | | | | |",
    ]


def test_goals_are_judged_against_the_best_peer_that_keeps_up(run: Run) -> None:
    title = "MiniLM by ids, 64 tokens:"
    assert [str(goal) for goal in goals(run)] == [
        f"{title} share refused or failed, 32 in flight, this project, fp32: 0.00% (0.00% to 0.00%); goal: at most 0, met",
        f"{title} requests/s over raw, fp32: 0.93 (0.91 to 0.95); goal: at least 0.92, met",
        f"{title} requests/s over the best peer's, fp32, best round: 1.02; goal: at least 1, met",
        f"{title} p99 of those answered, 32 in flight, over stock Triton's, fp32: 0.70 (0.64 to 0.75); goal: at most 0.8, met",
        f"{title} p99 at 70 % of raw over the best peer's, this project, fp32: 0.78 (0.45 to 1.10); goal: at most 0.6, "
        "missed",
        f"{title} p99 at 50 % of raw over the best peer's, this project, fp32: 1.20 (1.20 to 1.20); goal: at most 0.8, "
        "missed (the best peer is FastAPI, without batching)",
    ]


def test_a_small_model_has_goals_of_its_own() -> None:
    ours = result(RECOMMENDER, "ours-auto", [load(84, 9)], [load(50, 9)], [None])
    default = result(RECOMMENDER, "ours-fp32", [load(70, 9, 0.1)], [None], [None])
    peer = result(RECOMMENDER, "bentoml", [load(35, 90)], [None], [None])
    found = goals(Run(apart=True, where="here", rounds=1, duration_s=4, results=[default, ours, peer]))
    assert [(goal.name.partition(": ")[2], *goal.values, str(goal.goal)) for goal in found] == [
        ("share refused or failed, 32 in flight, this project, fp32", 0.1, "at most 0"),
        (f"share refused or failed, 32 in flight, this project, {AUTO}", 0, "at most 0"),
        ("requests/s over raw, fp32", 0.7, "at least 0.6"),
        ("requests/s over the best peer's, fp32", 2, "at least 1.5"),
        (f"requests/s over the best peer's, {AUTO}", 2.4, "at least 1.5"),
    ]


def test_refusals_miss_no_goal_if_a_server_of_this_throughput_is_too_slow_for_the_slo() -> None:
    refusing = result(IDS, "ours-fp32", [load(100, 200, 0.3)], [None], [None])
    for limit_ms, judged in ((319, 0), (320, 1)):  # 32 requests take 320 ms
        run = Run(apart=False, where="", rounds=1, duration_s=4, results=[refusing], limits_ms={IDS: limit_ms})
        assert len([goal for goal in goals(run) if "refused" in goal.name]) == judged


def test_one_slow_probe_of_raw_changes_no_ratio() -> None:
    found = result(IDS, "ours-fp32", [load(100, 200)] * 3, [None] * 3, [None] * 3)
    found.raw_per_s = [200.0, 50.0, 200.0]
    assert Run(apart=False, where="", rounds=3, duration_s=4, results=[found]).over_raw(found) == [0.5] * 3


def test_charts_have_a_row_for_each_measured_server_the_best_first(run: Run) -> None:
    def texts(chart: str) -> list[str | None]:
        return [text.text for text in ElementTree.fromstring(chart).iter("{http://www.w3.org/2000/svg}text")]

    assert texts(throughput_chart(run, IDS))[::2] == [
        "Triton, customary configuration",
        "this project, fp32",
        "FastAPI, without batching",
    ]
    assert texts(p99_chart(run, IDS))[:6] == [
        *("this project, fp32, at 70 %", "100 (90 to 110)"),
        *("Triton, customary configuration, at 70 %", "150 (100 to 200)"),
        *("FastAPI, without batching, at 70 %", "cannot keep up"),
    ]


def test_answers_are_compared_with_raw() -> None:
    vectors = np.eye(3)
    assert _turned(2 * vectors, vectors) == ""
    assert "0.0000 with raw" in _turned(vectors[::-1], vectors)
    items = np.arange(40).reshape(2, 20)
    assert _other_items(items[:, ::-1], items) == ""  # equal scores may change places
    assert "50% of its items are raw's" in _other_items(np.where(items < 20, items, 0), items)


def test_rows_of_several_lengths_are_padded_with_zeros() -> None:
    rows = [{"ids": np.array([[7, 8]])}, {"ids": np.array([[9]])}]
    assert padded(rows)["ids"].tolist() == [[7, 8], [9, 0]]


@pytest.mark.parametrize(
    ("head", "rest", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"{}", b"{}"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b'1\r\n{\r\n3\r\n"a"\r\n0\r\n\r\n', b'{"a"'),
    ],
)
async def test_an_answer_has_a_length_or_chunks(head: bytes, rest: bytes, body: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(rest)
    reader.feed_eof()
    assert await _body(reader, head) == body
