"""The report: one file, complete, without anything from outside."""

from __future__ import annotations

import re
import xml.dom.minidom
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import SloSpec
from loadtests.charts import Scale
from loadtests.report import page, write_report
from loadtests.results import Run
from tests.test_results import Request, saved_run, steady

SLO = SloSpec(p99_ms=50, rate_rps=100)
STATISTICS: dict[str, Any] = {
    "versions": ["3"],
    "inference_count": 1000,
    "execution_count": 400,
    "batches": {"1": 100, "4": 300},
    "success": {"count": 1000, "ns": 9_000_000_000},
    "fail": {"count": 7, "ns": 0},
    "queue": {"count": 1000, "ns": 2_000_000_000},
    "compute_input": {"count": 1000, "ns": 100_000_000},
    "compute_infer": {"count": 1000, "ns": 6_500_000_000},
    "compute_output": {"count": 1000, "ns": 400_000_000},
}
FAILING: list[Request] = [(p, s, f, "ServerBusy" if i % 3 else None) for i, (p, s, f, _) in enumerate(steady())]


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_the_verdict_comes_first_and_every_objective_is_told(tmp_path: Path) -> None:
    text = text_of(page(saved_run(tmp_path, steady(0.01)), SLO).partition("<body>")[2])
    assert text.startswith("✓ The SLO holds tiny over grpc, 100 requests/s")
    assert all(name in text for name in ("p99_ms", "rate_rps", "max_error_rate"))


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    html = page(saved_run(tmp_path, steady()), SLO)
    assert not re.search(r"""<(script|link|img|iframe|object)\b|\bsrc=|\bhref=|url\(|@import|https?:""", html)
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize(
    ("requests", "changes"),
    [
        (steady(), {}),
        (steady(), {"rate_rps": None, "users": 4}),
        (FAILING, {}),
        ([(p, s, f, "Unreachable") for p, s, f, _ in steady()], {}),
        ([], {}),
        (steady(count=1), {}),
    ],
    ids=["open loop", "closed loop", "two thirds fail", "all fail", "no request", "one request"],
)
def test_every_kind_of_run_is_drawn_as_sound_svg(
    tmp_path: Path, requests: list[Request], changes: dict[str, Any]
) -> None:
    html = page(saved_run(tmp_path, requests, **changes), SLO)
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) >= 4
    for chart in charts:
        xml.dom.minidom.parseString(chart)
        assert not re.search(r"\b(nan|inf)\b", chart)


def test_the_servers_own_account_is_split_and_its_rest_is_named(tmp_path: Path) -> None:
    server = {"version": "3", "statistics": STATISTICS}
    text = text_of(page(saved_run(tmp_path, steady(0.012), server=server), SLO))
    assert "waiting in Triton's queue 2.00 ms" in text
    assert "the model 6.50 ms" in text
    assert "client, network and the rest 3.0" in text
    assert "mean batch 2.50" in text
    assert "1 (25%), 4 (75%)" in text


def test_a_server_without_statistics_is_said_to_have_none(tmp_path: Path) -> None:
    assert "Not available" in text_of(page(saved_run(tmp_path, steady()), SLO))


def test_failures_are_told_by_kind(tmp_path: Path) -> None:
    text = text_of(page(saved_run(tmp_path, FAILING), SLO))
    assert "✕ The SLO is violated" in text
    assert "ServerBusy 666 (66.60%)" in text


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    run: Run = saved_run(tmp_path, steady(), url="<script>alert(1)</script>", model="<b>")
    assert "<script" not in page(run, SLO)
    assert "<b>&lt;" not in page(run, SLO)


def test_the_file_lies_in_the_runs_folder_and_may_be_drawn_again(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady())
    assert write_report(run, SLO) == write_report(run, SLO) == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run.json", "seconds.jsonl"]


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 103), [0, 50, 100]),
        (Scale(-4, 20), [0, 5, 10, 15, 20]),
        (Scale(0.9, 11000, log=True), [1, 10, 100, 1000, 10000]),
        (Scale(4, 60, log=True), [5, 10, 20, 50]),
    ],
    ids=["linear", "from below zero", "four decades", "one decade"],
)
def test_axes_have_round_figures(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks(5) == ticks
