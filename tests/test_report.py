"""The report: one file, complete, without anything from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.dom.minidom
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import SloSpec
from loadtests.capacity import Capacity
from loadtests.report import page, write_report
from loadtests.report.curves import failures_over_time, latency_over_time, step_s, steps
from loadtests.report.mix_page import Part, mix_page
from loadtests.report.searches import capacity_page, tuning_page
from loadtests.report.verdict import TIMES
from loadtests.results import Run
from loadtests.trial import Outcome, Phase, Served, Trial
from loadtests.tuning import Gain, Setting, TriedSetting, Tuning
from tests.conftest import run_module
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
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def trial(rate_rps: float, outcome: Outcome, p99_ms: float | None, phase: Phase = "bracket") -> Trial:
    failed = ("p99_ms",) if outcome == "fails" else ()
    figures: dict[str, Any] = {"achieved_rps": rate_rps, "p50_ms": p99_ms and p99_ms / 2, "p99_ms": p99_ms}
    return Trial(
        rate_rps=rate_rps,
        phase=phase,
        outcome=outcome,
        error_rate=0.0,
        duration_s=10,
        failed=failed,
        run="x",
        **figures,
    )


ABOUT: dict[str, Any] = {
    "model": "tiny",
    "target": "onnxruntime",
    "precision": "int8",
    "started": "2026-11-25T12:00:00+00:00",
}
CAPACITY = Capacity(
    **ABOUT,
    url="127.0.0.1:8001",
    protocol="grpc",
    objectives=("p99_ms ≤ 50.0 ms", "rate_rps ≥ 100.0/s"),
    trials=(
        trial(100, "holds", 12),
        trial(400, "fails", None),
        trial(200, "holds", 30, "confirm"),
        trial(1030, "inconclusive", 1234),
    ),
    capacity_rps=200,
    first_failing_rps=400,
    confirmed=True,
    limited_by="p99_ms",
)
DEFAULT = Setting(max_batch=64, max_queue_delay_us=0, instances=2, threads=1)
BEST = Setting(max_batch=16, max_queue_delay_us=0, instances=1, threads=2)
TUNING = Tuning(
    **ABOUT,
    objectives=("p99_ms ≤ 50.0 ms",),
    default=DEFAULT,
    best=BEST,
    trials=(
        TriedSetting(settings=DEFAULT, throughput_rps=100, p99_ms=40),
        TriedSetting(settings=BEST, throughput_rps=140, p99_ms=30, capacity_rps=131, pareto=True),
        TriedSetting(settings=DEFAULT.model_copy(update={"max_batch": 4}), throughput_rps=90, p99_ms=50),
        TriedSetting(settings=DEFAULT.model_copy(update={"max_batch": 1}), stopped_early=True, reason="slow"),
    ),
    users=32,
    reference_rps=70,
    gain=Gain(of="capacity_rps", ratio=1.31, low=1.22, high=1.40, confidence=0.95, pairs=6),
    applied=True,
    conclusion="the best setting holds 1.31 times the rate",
)


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_the_verdict_comes_first_and_every_objective_is_told(tmp_path: Path) -> None:
    text = text_of(page(saved_run(tmp_path, steady(0.01)), SLO).partition("<body>")[2])
    assert text.startswith("✓ The SLO holds tiny over grpc, 100 requests/s")
    assert all(name in text for name in ("p99_ms", "rate_rps", "max_error_rate"))


def mixed(folder: Path, second_ms: float = 60) -> list[Part]:
    """A mix of two models, the second of which takes 80 ms, for short inputs and for long ones."""
    server = {"version": "3", "statistics": STATISTICS}
    shared: dict[str, Any] = {"mix": "shop:3,text:1", "server": server}
    shop = saved_run(folder / "shop" / "1", steady(0.01), model="shop", rate_rps=75.0, **shared)
    text = saved_run(folder / "text" / "1", steady(0.08, count=500), model="text", rate_rps=50.0, seed=1, **shared)
    text = replace(text, lengths={"sequence 16": shop.window, "sequence 128": text.window})
    return [(shop, SloSpec(p99_ms=50, rate_rps=75)), (text, SloSpec(p99_ms=second_ms, rate_rps=50))]


def every_page(folder: Path) -> dict[str, str]:
    """One of each kind."""
    run, other = saved_run(folder / "one", FAILING), saved_run(folder / "two", steady(0.02), seed=1)
    return {
        "run": page(run, SLO, CAPACITY, TUNING),
        "runs": page([run, other], SLO),
        "mix": mix_page(mixed(folder)),
        "capacity": capacity_page(CAPACITY),
        "tuning": tuning_page(TUNING),
    }


@pytest.mark.parametrize("kind", ["run", "runs", "mix", "capacity", "tuning"])
def test_nothing_is_fetched_from_anywhere_and_the_page_forbids_it(tmp_path: Path, kind: str) -> None:
    html = every_page(tmp_path)[kind]
    assert not re.search(r"""<(script|link|img|iframe|object)\b|\bsrc=|\bhref=|url\(|@import|https?:|\bon\w+=""", html)
    assert """Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';""" in html
    assert "prefers-color-scheme: dark" in html


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    frames = ""
    for kind, html in every_page(tmp_path).items():
        (tmp_path / f"{kind}.html").write_text(html)
        frames += f"<iframe id={kind} src={kind}.html style='width:390px;height:800px;border:0'></iframe>"
    wide = "[...f.contentDocument.querySelectorAll('html, header, .card')].filter(e => e.scrollWidth > e.clientWidth)"
    told = f"[...document.querySelectorAll('iframe')].map(f => f.id + ': ' + {wide}.map(e => e.innerText.slice(0, 20)))"
    script = f"<script>onload = () => document.title = {told}.join(', ')</script>"
    (tmp_path / "all.html").write_text(frames + script)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    run = subprocess.run(
        [
            str(CHROMIUM),
            *flags,
            "--virtual-time-budget=5000",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"file://{tmp_path}/all.html",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "<title>run: , runs: , mix: , capacity: , tuning: </title>" in run.stdout, (
        run.stdout[-500:] + run.stderr[-500:]
    )


@pytest.mark.parametrize("kind", ["run", "runs", "mix", "capacity", "tuning"])
def test_each_charts_figures_can_be_had_by_pointer_and_by_keyboard(tmp_path: Path, kind: str) -> None:
    charts = [chart for chart in re.findall(r"<svg.*?</svg>", every_page(tmp_path)[kind], re.DOTALL) if "axis" in chart]
    assert charts
    for chart in charts:
        xml.dom.minidom.parseString(chart)
        tips = re.findall(r'class="tip" role="img" aria-label="([^"]+)"', chart)
        assert tips
        assert 1 <= chart.count('tabindex="0"') <= 8


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    slow, fast = saved_run(tmp_path / "slow", steady(0.02)), saved_run(tmp_path / "fast", steady(0.01), rate_rps=100.5)
    path = write_report([slow, fast], SLO)
    html = path.read_text()
    text = text_of(html)
    assert path == tmp_path / "fast" / "report-2-runs.html"
    assert "2 runs laid over each other" in text
    assert f"10.1 ms {TIMES} 0.50" in text
    assert "rate_rps 100.0 100.5" in text  # what differs
    assert html.count('class="line runA"') == html.count('class="line runB"') == 4


@pytest.mark.parametrize(("second_ms", "whole"), [(90, "✓ The mix holds every SLO"), (60, "✕ The mix violates an SLO")])
def test_a_mix_is_judged_as_a_whole_and_part_by_part(tmp_path: Path, second_ms: float, whole: str) -> None:
    text = text_of(mix_page(mixed(tmp_path, second_ms)).partition("<body>")[2])
    assert text.startswith(f"{whole} shop:3, text:1 over grpc, 125 requests/s in all")
    assert (
        text.index("shop ✓ SLO holds")
        < text.index("at most 50.0 ms")
        < text.index("text ✓" if second_ms > 80 else "text ✕")
    )
    assert "requests in all 1,500" in text


def test_each_part_of_a_mix_has_a_curve_of_its_own_with_its_own_limit(tmp_path: Path) -> None:
    html = mix_page(mixed(tmp_path))
    assert (
        html.count('class="line runA"') == html.count('class="line runB"') == 5
    )  # four charts, and that of the lengths
    assert [html.count(f'class="line limit run{letter}"') for letter in "AB"] == [1, 1]
    text = text_of(html)
    assert "its SLO: p99 50.0 ms" in text
    assert "its SLO: p99 60.0 ms" in text
    assert "p99, shop 10.1 ms, text 80.1 ms" in html


def test_latency_is_drawn_by_the_length_of_the_input(tmp_path: Path) -> None:
    (_, _), (text, slo) = mixed(tmp_path)
    html = page(text, slo)
    chart = html.partition("By length of the input")[2].partition("</section>")[0]
    assert "p99, sequence 16 10.1 ms, sequence 128 80.1 ms" in chart
    assert "sequence 128 500 80.1 ms 80.1 ms" in text_of(chart)


def test_failures_are_drawn_by_kind_over_time(tmp_path: Path) -> None:
    requests = [(p, s, f, ("ServerBusy", "dropped", None)[i % 3]) for i, (p, s, f, _) in enumerate(steady())]
    html = page(saved_run(tmp_path, requests), SLO)
    chart = re.search(
        r'<figure>(?:(?!</figure>).)*aria-label="Failures over time by kind".*?</figure>', html, re.DOTALL
    )
    assert chart is not None
    assert "ServerBusy" in chart[0].partition("<svg")[0]
    assert "dropped" in chart[0].partition("<svg")[0]
    assert "second 3, ServerBusy 34, dropped 33" in chart[0]


def test_a_second_without_a_p99_is_marked(tmp_path: Path) -> None:
    requests = [(p, s, f, "Unreachable" if 3 <= p < 4 else None) for p, s, f, _ in steady()]
    html = page(saved_run(tmp_path, requests), SLO)
    assert html.count('class="point cross failed"') == 1
    assert "over 1 % not answered" in html


def test_a_soak_is_drawn_in_steps_whose_requests_are_added(tmp_path: Path) -> None:
    requests = [(float(second), float(second), second + (0.5 if second == 7 else 0.01), None) for second in range(600)]
    run = saved_run(tmp_path, requests, rate_rps=1.0, duration_s=600.0, warmup_s=0.0)
    found = steps(run, step_s([run]))
    assert [len(found), found[0].start_s, found[-1].end_s] == [120, 0, 600]
    assert sum(step.stretch.planned for step in found) == 600
    assert found[1].stretch.latency("intended").percentile_ms(99) == pytest.approx(500, rel=2e-3)  # not an average


def test_seconds_in_which_nothing_was_planned_are_drawn_as_such(tmp_path: Path) -> None:
    requests = [(float(at), float(at), at + 0.1, "ServerBusy" if at == 5 else None) for at in range(0, 100, 5)]
    run = saved_run(tmp_path, requests, rate_rps=0.2, duration_s=100.0)
    found = steps(run, 1.0)
    assert [step.start_s for step in found] == list(range(96))
    assert [step.stretch.planned for step in found[:7]] == [1, 0, 0, 0, 0, 1, 0]
    bar = re.search(r'class="area kind1" d="M([\d.]+) [\d.]+V[\d.]+H([\d.]+)', failures_over_time(run))
    assert bar is not None
    assert float(bar[2]) - float(bar[1]) < 6  # of 460 for 100 s
    median = re.search(r'class="line median" d="([^"]*)"', latency_over_time([run], SLO))
    assert median is not None
    assert median[1].count("L") == 17  # it passes over them, and breaks at the one that failed


def test_threads_that_onnx_runtime_chooses_are_called_automatic() -> None:
    settings = Served(max_batch=8, instances=2, threads=0)
    text = text_of(capacity_page(CAPACITY.model_copy(update={"settings": settings})))
    assert "instances 2 threads automatic" in text


def test_no_line_is_drawn_over_the_word_of_a_shade(tmp_path: Path) -> None:
    html = page(saved_run(tmp_path, steady(0.01)), SLO)
    (chart,) = re.findall(r'<svg[^>]*aria-label="Latency over time".*?</svg>', html, re.DOTALL)
    assert max(chart.rindex(f'class="{name}') for name in ("line", "grid")) < chart.index(">warm-up<")


def test_a_trial_that_was_never_sent_is_no_point() -> None:
    unsent = trial(5000, "invalid", None).model_copy(update={"run": ""})
    html = capacity_page(CAPACITY.model_copy(update={"trials": (*CAPACITY.trials, unsent)}))
    assert "5000/s invalid" not in html
    assert "5000 - - - - ?" in text_of(html)


def test_the_knee_is_drawn_where_the_capacity_is() -> None:
    text = text_of(capacity_page(CAPACITY))
    assert text.startswith("tiny: Holds its SLO up to 200 requests/s")
    html = capacity_page(CAPACITY)
    assert re.search('class="tick knee-text"[^>]*>200/s<', html)
    assert "SLO: p99 50.0 ms" in html
    assert html.count('class="point circle holds"') == 2
    assert html.count('class="point cross failed"') == 1


def test_a_search_that_the_generator_ended_says_at_least() -> None:
    found = CAPACITY.model_copy(update={"limited_by": "generator", "confirmed": False})
    text = text_of(capacity_page(found))
    assert "At least 200 requests/s" in text
    assert "at least 200/s" in text


def test_the_front_shows_default_and_best() -> None:
    html = tuning_page(TUNING)
    assert [html.count(f'class="point {look}"') for look in ("star holds", "diamond service", "circle median")] == [
        1,
        1,
        1,
    ]
    assert "1 instance x 2 threads, batches of 16, delay 0 us" in text_of(html)
    assert "x 1.31 (95%: 1.22 to 1.40, 6 pairs)" in text_of(html)


def test_a_search_without_a_better_setting_says_so() -> None:
    found = TUNING.model_copy(update={"best": None, "gain": None, "applied": False})
    assert "No setting is better than the default" in text_of(tuning_page(found))
    assert "star holds" not in tuning_page(found).partition("</style>")[2]


def test_the_command_draws_searches_alone_and_several_runs(tmp_path: Path) -> None:
    build = tmp_path / "recommender"
    runs = [saved_run(build / "loadtests" / name, steady(), model="recommender").folder for name in ("1", "2")]
    CAPACITY.save(build / "capacity.json")
    TUNING.save(build / "tuning.json")
    drawn = run_module("loadtests.report", "--capacity", "--tuning", BUILD=str(tmp_path))
    assert drawn.stdout.split() == [str(build / "capacity.html"), str(build / "tuning.html")], drawn.stderr
    flags = [flag for run in runs for flag in ("--run", str(run))]
    assert run_module("loadtests.report", *flags, BUILD=str(tmp_path)).stdout.split() == [
        str(runs[1] / "report-2-runs.html")
    ]
    latest = run_module("loadtests.report", BUILD=str(tmp_path)).stdout.strip()
    assert "Holds" in (build / "capacity.html").read_text()
    assert "Capacity 200/s" in text_of(Path(latest).read_text())


def test_the_command_draws_a_mix_in_the_folder_of_its_first_model(tmp_path: Path) -> None:
    for model in ("recommender", "minilm"):
        saved_run(tmp_path / model / "loadtests" / "1", steady(), model=model, mix="recommender:3,minilm:1")
    drawn = run_module("loadtests.report", "--mix", "recommender:3, minilm:1", BUILD=str(tmp_path))
    path = tmp_path / "recommender" / "loadtests" / "1" / "report-mix.html"
    assert drawn.stdout.strip() == str(path), drawn.stderr
    assert "The mix" in text_of(path.read_text())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--capacity"], "make it with: make capacity"),
        (["--tuning"], "make it with: make tune"),
        (["--run", "a", "--capacity"], "leave out"),
        ([flag for name in "abcdefg" for flag in ("--run", name)], "at most 6"),
        (["--run", "/nowhere"], "not a load test run"),
        (["--mix", "recommender:3,minilm:1", "--capacity"], "leave out"),
        ([], "make loadtest"),
    ],
    ids=["no capacity", "no tuning", "a run and a search", "too many", "no such run", "a mix and a search", "no run"],
)
def test_what_is_not_there_is_one_line(tmp_path: Path, flags: list[str], reason: str) -> None:
    run = run_module("loadtests.report", *flags, BUILD=str(tmp_path))
    assert run.returncode == 2
    assert reason in run.stderr
    assert "Traceback" not in run.stderr


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
