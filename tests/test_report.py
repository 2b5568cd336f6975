"""The report: one complete file without external resources."""

from __future__ import annotations

import re
import xml.dom.minidom
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import SloSpec
from loadtests.report.curves import latency_over_time, percentiles, step_s, steps
from loadtests.report.headline import TIMES, figures, objectives
from loadtests.report.run_page import Part, mix_page, page, write_report
from loadtests.report.searches import capacity_page, tuning_page
from loadtests.search.capacity_result import Capacity, ServerSettings
from loadtests.slo.judge import judge
from loadtests.tune.search_space import ServingSettings
from loadtests.tune.tune_result import Compared, ExpectedSettings, TuneResult
from tests.browser import Browser, needs_chromium
from tests.computed_server import trial
from tests.conftest import Refused, RunHere
from tests.saved_runs import Request, saved_run, steady

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
ABOUT: dict[str, Any] = {"model": "tiny", "target": "onnxruntime", "precision": "int8"}
ABOUT |= {"started": "2026-11-25T12:00:00+00:00", "objectives": ("p99_ms ≤ 50.0 ms", "rate_rps ≥ 100.0/s")}
FOUND: dict[str, Any] = {"capacity_rps": 200, "first_failing_rps": 400, "confirmed": True, "limited_by": "p99_ms"}
TRIALS = (
    trial(100, "holds", p99_ms=12),
    trial(400, "fails", p99_ms=None),
    trial(200, "holds", "confirm", p99_ms=30),
    trial(1030, "inconclusive", p99_ms=1234),
)
CAPACITY = Capacity(**ABOUT, **FOUND, url="127.0.0.1:8001", protocol="grpc", trials=TRIALS)
DEFAULT = ServingSettings(max_batch=64, max_queue_delay_us=0, instances=2, threads=1)
BEST = ServingSettings(max_batch=16, max_queue_delay_us=0, instances=1, threads=2)
GAIN: dict[str, Any] = {"ratio": 1.31, "low": 1.22, "high": 1.40, "confidence": 0.95}
TUNING = TuneResult(
    **ABOUT,
    default=DEFAULT,
    best=BEST,
    usual_rps=70,
    high_rps=120,
    predicted=True,
    expected=(
        ExpectedSettings(settings=DEFAULT, p99_ms=40, high_p99_ms=90),
        ExpectedSettings(settings=BEST, p99_ms=30, high_p99_ms=50),
        ExpectedSettings(settings=DEFAULT.model_copy(update={"max_batch": 4}), p99_ms=50, high_p99_ms=80),
        ExpectedSettings(settings=DEFAULT.model_copy(update={"max_batch": 1}), p99_ms=None, high_p99_ms=None),
    ),
    comparisons=(Compared(settings=BEST, rate_rps=70, pairs=((40.0, 30.0), (41.0, 31.0)), outcome="better", **GAIN),),
    applied=True,
    conclusion="the p99 of the best setting is 1.31 times lower",
)


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_the_verdict_comes_first_and_the_servers_time_is_split(tmp_path: Path) -> None:
    server = {"version": "3", "statistics": {**STATISTICS, "text_tokens": 8000, "text_padded_tokens": 9000}}
    run = saved_run(tmp_path, steady(0.012, 7000, seconds=70), duration_s=70.0, server=server)
    text = text_of(page([run], SLO).partition("<body>")[2])
    assert text.startswith("✓ The SLO holds tiny over grpc, 100 requests/s")
    assert all(name in text for name in ("p99_ms", "rate_rps", "max_error_rate"))
    assert "waiting in Triton's queue 2.00 ms" in text
    assert "the model 6.50 ms" in text
    assert "client, network and the rest 3.0" in text
    assert "mean batch 2.50" in text
    assert "1 (25%), 4 (75%)" in text
    assert "padding of texts 1.12 (tokens with padding over tokens; 1: none)" in text


def test_the_bar_of_an_objective_is_empty_if_it_was_not_measured(tmp_path: Path) -> None:
    limits = ("p50_ms < 20", "p50_ms < 20 @ 7 rps", "max_ms < 5")
    judgement = judge(saved_run(tmp_path, steady(0.01, lag_s=0)), SloSpec(objectives=limits))
    widths = re.findall(r"width:([\d.]+)%", objectives(judgement))
    assert [float(width) for width in widths[-3:]] == [pytest.approx(40, abs=0.1), 0, 100]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    """A mix of two models with short and long inputs; the second model takes 80 ms."""
    folder = tmp_path_factory.mktemp("mix")
    server = {"version": "3", "statistics": STATISTICS}
    shared: dict[str, Any] = {"mix": "shop:3,text:1", "server": server, "duration_s": 70.0}
    shop = saved_run(folder / "shop" / "1", steady(0.01, 7000, seconds=70), model="shop", rate_rps=75.0, **shared)
    text = saved_run(
        folder / "text" / "1", steady(0.08, 3500, seconds=70), model="text", rate_rps=50.0, seed=1, **shared
    )
    text = replace(text, lengths={"sequence 16": shop.window, "sequence 128": text.window})
    return [(shop, SloSpec(p99_ms=50, rate_rps=75)), (text, SloSpec(p99_ms=60, rate_rps=50))]


def test_requests_without_an_answer_are_shaded_also_if_all_failed(tmp_path: Path) -> None:
    for name, requests in (("some", FAILING), ("all", [(*each[:3], "Unreachable") for each in FAILING])):
        assert ">not answered<" in percentiles([saved_run(tmp_path / name, requests)], [SLO])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, parts: list[Part]) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    run, other = saved_run(folder / "one", FAILING), saved_run(folder / "two", steady(0.02), seed=1)
    return {
        "run": page([run], SLO, CAPACITY, TUNING),
        "runs": page([run, other], SLO),
        "mix": mix_page(parts),
        "capacity": capacity_page(CAPACITY),
        "tuning": tuning_page(TUNING),
    }


KINDS = pytest.mark.parametrize("kind", ["run", "runs", "mix", "capacity", "tuning"])


@KINDS
def test_a_page_has_no_external_resources_and_forbids_them(pages: dict[str, str], kind: str) -> None:
    html = pages[kind]
    assert not re.search(r"""<(script|link|img|iframe|object)\b|\bsrc=|\bhref=|url\(|@import|https?:|\bon\w+=""", html)
    assert """Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';""" in html
    assert "prefers-color-scheme: dark" in html


@needs_chromium
def test_the_page_fits_a_phone(tmp_path: Path, pages: dict[str, str]) -> None:
    wide = "[...document.querySelectorAll('html, header, .card')].filter(each => each.scrollWidth > each.clientWidth)"
    with Browser(tmp_path / "profile") as phone:
        phone.size(390, 800)
        for kind, html in pages.items():
            (tmp_path / f"{kind}.html").write_text(html)
            phone.open(f"file://{tmp_path}/{kind}.html")
            phone.wait(f"document.readyState === 'complete' && location.href.endsWith('/{kind}.html')")
            assert phone.js(f"{wide}.map(each => each.innerText.slice(0, 20))") == [], kind


@KINDS
def test_pointer_and_keyboard_show_the_figures_of_each_chart(pages: dict[str, str], kind: str) -> None:
    charts = [chart for chart in re.findall(r"<svg.*?</svg>", pages[kind], re.DOTALL) if "axis" in chart]
    assert charts
    for chart in charts:
        assert re.findall(r'class="tip" role="img" aria-label="([^"]+)"', chart)
        assert 1 <= chart.count('tabindex="0"') <= 8


def test_several_runs_are_overlaid(tmp_path: Path) -> None:
    slow, fast = saved_run(tmp_path / "slow", steady(0.02)), saved_run(tmp_path / "fast", steady(0.01), rate_rps=100.5)
    path = write_report([slow, fast], SLO)
    html = path.read_text()
    text = text_of(html)
    assert path == tmp_path / "fast" / "report-2-runs.html"
    assert "2 runs compared" in text
    assert f"10.1 ms {TIMES} 0.50" in text
    assert "rate_rps 100.0 100.5" in text  # the difference
    assert html.count('class="line runA"') == html.count('class="line runB"') == 3


def test_runs_are_not_compared_by_a_percentile_of_too_few_requests(tmp_path: Path) -> None:
    runs = [saved_run(tmp_path / name, steady(seconds)[:400]) for name, seconds in (("a", 0.02), ("b", 0.01))]
    assert text_of(figures(runs)).startswith("p50 p95 p99 p99.9 answers/s failed A 20.1 ms 20.1 ms 20.1 ms - ")
    assert f"10.1 ms {TIMES} 0.50 - " in text_of(figures(runs))


def test_a_mix_is_judged_as_a_whole_and_part_by_part(parts: list[Part], pages: dict[str, str]) -> None:
    shop, (text, _) = parts
    for html, whole, part in (
        (mix_page([shop, (text, SloSpec(p99_ms=90, rate_rps=50))]), "✓ The mix holds every SLO", "text ✓"),
        (pages["mix"], "✕ The mix violates an SLO", "text ✕"),
    ):
        shown = text_of(html.partition("<body>")[2])
        assert shown.startswith(f"{whole} shop:3, text:1 over grpc, 125 requests/s in all")
        assert shown.index("shop ✓ SLO holds") < shown.index("at most 50.0 ms") < shown.index(part)


def test_each_part_of_a_mix_has_its_own_curve_and_limit(pages: dict[str, str]) -> None:
    html = pages["mix"]
    assert html.count('class="line runA"') == html.count('class="line runB"') == 3
    assert [html.count(f'class="line limit run{letter}"') for letter in "AB"] == [1, 1]
    assert "its SLO: p99 50.0 ms" in text_of(html)
    assert "its SLO: p99 60.0 ms" in text_of(html)
    assert "p99, shop 10.1 ms, text 80.1 ms" in html


def test_latency_is_shown_by_input_length(parts: list[Part]) -> None:
    text, slo = parts[1]
    told = text_of(page([text], slo)).partition("By input length")[2]
    assert (
        "sequence 16 7,000 10.1 ms 10.1 ms 10.1 ms 10.1 ms sequence 128 3,500 80.1 ms 80.1 ms 80.1 ms 80.1 ms " in told
    )


def test_a_second_without_a_p99_is_marked(tmp_path: Path) -> None:
    requests = [(p, s, f, "Unreachable" if 3 <= p < 4 else None) for p, s, f, _ in steady()]
    html = page([saved_run(tmp_path, requests)], SLO)
    assert html.count('class="point cross failed"') == 1
    assert "over 1 % failed" in html


def test_a_soak_is_drawn_in_steps_with_merged_histograms(tmp_path: Path) -> None:
    requests = [(float(second), float(second), second + (0.5 if second == 7 else 0.01), None) for second in range(600)]
    run = saved_run(tmp_path, requests, rate_rps=1.0, duration_s=600.0, warmup_s=0.0)
    found = steps(run, step_s([run]))
    assert [len(found), found[0].start_s, found[-1].end_s] == [120, 0, 600]
    assert sum(step.stretch.planned for step in found) == 600
    assert found[1].stretch.latency("intended").percentile_ms(99) == pytest.approx(500, rel=2e-3)  # not an average


def test_seconds_without_planned_requests_are_drawn(tmp_path: Path) -> None:
    requests = [(float(at), float(at), at + 0.1, "ServerBusy" if at == 5 else None) for at in range(0, 100, 5)]
    run = saved_run(tmp_path, requests, rate_rps=0.2, duration_s=100.0)
    found = steps(run, 1.0)
    assert [step.start_s for step in found] == list(range(96))
    assert [step.stretch.planned for step in found[:7]] == [1, 0, 0, 0, 0, 1, 0]
    median = re.search(r'class="line median" d="([^"]*)"', latency_over_time([run], [SLO]))
    assert median is not None
    assert median[1].count("L") == 17  # it bridges them, and breaks at the failed one


def test_failures_are_shown_by_kind_and_over_time(tmp_path: Path) -> None:
    kinds = "ServerBusy: the queue\nis full", "dropped", None
    requests = [(p, s, f, kinds[i % 3]) for i, (p, s, f, _) in enumerate(steady())]
    html = page([saved_run(tmp_path, requests)], SLO)
    assert "second 3, 100 planned, 34 answered, 67 failed, ServerBusy 34, dropped 33" in html
    assert "ServerBusy 334 (33.40%): the queue is full dropped 333 (33.30%)" in text_of(html)


def test_the_highest_rate_that_holds_is_drawn() -> None:
    html = capacity_page(CAPACITY)
    assert text_of(html).startswith("tiny: Meets the SLO up to 200 requests/s")
    assert re.search('class="tick capacity-text"[^>]*>200/s<', html)
    assert "SLO: p99 50.0 ms" in html
    assert [html.count(f'class="point {look}"') for look in ("circle holds", "cross failed")] == [2, 1]


def test_a_search_that_the_generator_limited_shows_a_lower_bound() -> None:
    unsent = trial(5000, "invalid", run="")
    settings = ServerSettings(max_batch=8, instances=2, threads=0)
    changes = {"limited_by": "generator", "confirmed": True, "settings": settings}
    html = capacity_page(CAPACITY.model_copy(update={"trials": (*CAPACITY.trials, unsent), **changes}))
    text = text_of(html)
    assert "At least 200 requests/s" in text
    assert "at least 200/s" in text
    assert "5000/s invalid" not in html  # not a point of the chart
    assert "5000 - - - - ?" in text
    assert "instances 2 threads automatic" in text
    changes["confirmed"] = False
    text = text_of(capacity_page(CAPACITY.model_copy(update=changes)))
    assert "About 200 requests/s, not confirmed" in text
    assert "about 200/s" in text


def test_the_chart_of_a_search_for_settings_shows_default_and_best() -> None:
    html = tuning_page(TUNING)
    for look in ("star holds", "diamond service", "circle median"):
        assert html.count(f'class="point {look}"') == 1
    assert "1 instance x 2 threads, batches of 16, delay 0 us" in text_of(html)
    assert "1.31 times as high (95%: 1.22 to 1.40, 2 pairs): better" in text_of(html)
    assert "batches of 16, delay 0 us 70/s 41.0 ms 31.0 ms 2" in text_of(html)
    none = tuning_page(TUNING.model_copy(update={"best": None, "comparisons": (), "applied": False}))
    assert "No setting is proved better than the default" in text_of(none)
    assert "star holds" not in none.partition("</style>")[2]


def test_the_command_draws_several_runs_with_capacity_or_a_mix(tmp_path: Path, run_here: RunHere) -> None:
    build = tmp_path / "recommender"
    runs = [saved_run(build / "loadtests" / name, steady(), model="recommender").folder for name in ("1", "2")]
    CAPACITY.save(build / "capacity.json")
    flags = [flag for run in runs for flag in ("--run", str(run))]
    drawn = run_here("report", *flags, DEEPSEEK_BUILD=str(tmp_path))
    assert drawn.stdout.strip() == str(runs[1] / "report-2-runs.html"), drawn.stderr
    latest = run_here("report", DEEPSEEK_BUILD=str(tmp_path)).stdout.strip()
    assert "Capacity 200/s" in text_of(Path(latest).read_text())
    for model in ("recommender", "minilm"):
        saved_run(tmp_path / model / "loadtests" / "3", steady(), model=model, mix="recommender:3,minilm:1")
    drawn = run_here("report", "--mix", "recommender:3, minilm:1", DEEPSEEK_BUILD=str(tmp_path))
    path = build / "loadtests" / "3" / "report-mix.html"
    assert drawn.stdout.strip() == str(path), drawn.stderr
    assert "recommender:3,minilm:1: inconclusive" in text_of(path.read_text())  # 10 s decide no p99


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([flag for name in "abcdefg" for flag in ("--run", name)], "at most 6"),
        (["--run", "/nowhere"], "not a load test run"),
        (["--mix", "recommender:3,minilm:1", "--run", "a", "--run", "b"], "at most one --run"),
        ([], "make loadtest"),
    ],
)
def test_missing_input_gives_a_one_line_error(tmp_path: Path, refused: Refused, flags: list[str], reason: str) -> None:
    assert reason in refused("report", *flags, DEEPSEEK_BUILD=str(tmp_path))


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
def test_every_kind_of_run_is_drawn_as_valid_svg(
    tmp_path: Path, requests: list[Request], changes: dict[str, Any]
) -> None:
    html = page([saved_run(tmp_path, requests, **changes)], SLO)
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) >= 3
    for chart in charts:
        xml.dom.minidom.parseString(chart)
        assert not re.search(r"\b(nan|inf)\b", chart)


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    html = page([saved_run(tmp_path, steady(), url="<script>alert(1)</script>", model="<b>")], SLO)
    assert "<script" not in html
    assert "<b>&lt;" not in html


def test_the_page_is_in_the_runs_folder_and_can_be_drawn_again(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady())
    assert write_report([run], SLO) == write_report([run], SLO) == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run.json", "seconds.jsonl"]
