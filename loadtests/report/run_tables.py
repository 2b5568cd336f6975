"""The tables of a run: where the time goes, percentiles, failures, the generator's health, settings, machine."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from deepseek.svg_chart import stacked_bar
from loadtests.percentiles import ALL, SUMMARY, ms
from loadtests.report.curves import curves
from loadtests.report.headline import names_of
from loadtests.report.page import facts, numbers, sentence, utc
from loadtests.results.run import Run
from loadtests.results.settings import IN_FLIGHT
from loadtests.results.stretch import shown_percentile
from loadtests.slo.time_split import TimeSplit, mean_batch, padding_share

PARTS = {
    "queue": "waiting in Triton's queue",
    "compute_input": "preparing inputs",
    "compute_infer": "the model",
    "compute_output": "preparing outputs",
    "rest": "client, network and the rest",
}
UNKNOWN = "<p>Not available: the server did not answer, was restarted, or does not show Triton's statistics here.</p>"


def _rows(split: TimeSplit) -> list[tuple[str, float]]:
    return [*split.parts.items(), ("rest", split.outside)]


def server(run: Run) -> str:
    """The split of the mean request, as a bar and as figures."""
    split = TimeSplit.of_run(run)
    if split is None:
        return UNKNOWN
    rows = _rows(split)
    legend = "".join(
        f"<tr><td><i class='swatch {css}'></i>{PARTS[css]}</td><td>{ms(value)}</td>"
        f"<td>{_share(value, split.total)}</td></tr>"
        for css, value in rows
    )
    bar = stacked_bar(rows, "Where the mean request spends its time")
    return f"{bar}<table class='numbers split'>{legend}</table>{facts(_batches(run))}"


def _share(value: float, whole: float) -> str:
    return f"{value / whole:.0%}" if whole else "-"


def _batches(run: Run) -> list[tuple[str, object]]:
    statistics = run.server["statistics"]
    executions = max(1, statistics["execution_count"])
    batches = sorted((int(size), times / executions) for size, times in statistics["batches"].items())
    common = ", ".join([f"{size} ({share:.0%})" for size, share in batches if share >= 0.005][:8])
    share = padding_share(statistics)
    padding = [("padding of texts", f"{share:.2f} (tokens with padding over tokens; 1: none)")] if share else []
    return [
        ("mean batch", f"{mean_batch(statistics):.2f}"),
        ("batch sizes", common or "-"),
        *padding,
        ("executions", f"{statistics['execution_count']:,} for {statistics['success']['count']:,} requests"),
        ("failures counted by Triton", f"{statistics['fail']['count']:,}"),
    ]


def servers(runs: Sequence[Run]) -> str:
    """The splits of several runs, as bars with one scale."""
    splits = [(name, TimeSplit.of_run(run)) for name, run in zip(names_of(runs), runs, strict=True)]
    longest = max((split.total for _, split in splits if split), default=0.0)
    if not longest:
        return UNKNOWN
    css = "row" if all(len(name) == 1 for name, _ in splits) else "row named"
    bars = "".join(
        f"<div class='{css}'><b>{escape(name)}</b>{stacked_bar(_rows(split), f'Split of {name}', longest)}</div>"
        for name, split in splits
        if split
    )
    legend = "".join(f"<span><i class='swatch {css}'></i>{part}</span>" for css, part in PARTS.items())
    head = ["", *(name for name, split in splits if split)]
    table = [(part, *(ms(dict(_rows(split))[css]) for _, split in splits if split)) for css, part in PARTS.items()]
    told = "".join(f"<p><b>{escape(name)}.</b> {sentence(split.account)}</p>" for name, split in splits if split)
    return f"<div class='legend'>{legend}</div>{bars}{numbers(head, table)}{told}"


def percentiles(runs: Sequence[Run]) -> str:
    found = {curve.name: curve.run.window.latency(curve.kind) for curve in curves(runs)}
    rows = [(f"p{percent:g}", *(shown_percentile(each, percent) for each in found.values())) for percent in ALL]
    rows.append(("slowest", *(ms(each.max_ms) for each in found.values())))
    rows.append(("mean", *(ms(each.mean_ms) for each in found.values())))
    return f"<div class='scroll'>{numbers(['', *found], rows)}</div>"


def lengths(run: Run) -> str:
    """Latency by the length of the inputs; "" if all have one length."""
    if not run.lengths:
        return ""
    rows = []
    for name, part in run.lengths.items():
        latency = part.latency(run.judged)
        rows.append((name, f"{part.planned:,}", *(shown_percentile(latency, percent) for percent in SUMMARY)))
    head = [run.judged, "requests", *(f"p{percent:g}" for percent in SUMMARY)]
    return f"<div class='scroll'>{numbers(head, rows)}</div>"


def failures(run: Run) -> str:
    """Errors and drops by kind, each with a message; "" if nothing failed."""
    planned, messages = max(1, run.window.planned), run.window.messages
    rows = [
        (kind, ": ".join(filter(None, (f"{count:,} ({count / planned:.2%})", messages.get(kind)))))
        for kind, count in run.window.errors.most_common()
    ]
    return facts(rows) if rows else ""


def generator(run: Run, others: Sequence[Run] = ()) -> str:
    """The generator's health; `others` are the other parts of the mix that it sent at the same time."""
    rows: list[tuple[str, object]] = [
        (name.replace("_cpu", " CPU"), f"{share:.0%}") for name, share in run.generator.items() if name.endswith("_cpu")
    ]
    if run.settings.open_loop:
        rows[:0] = [row for each in (run, *others) for row in _lateness(each, named=bool(others))]
        rows.append(("real-time priority", "yes" if run.generator.get("precedence") else "no"))
    if run.generator.get("workers", 1) > 1:
        rows.append(("workers", f"{run.generator['workers']}, {run.generator.get('workers_lost', 0)} lost"))
    return facts(rows)


def _lateness(run: Run, named: bool) -> list[tuple[str, object]]:
    lag, whose = run.window.latency("lag"), f", {run.settings.model}" if named else ""
    return [
        (f"requests started in time{whose}", f"{run.window.attempted_share:.2%}"),
        (f"send lag p50 / p99{whose}", f"{ms(lag.percentile_ms(50))} / {ms(lag.percentile_ms(99))}"),
    ]


def settings(run: Run) -> str:
    own = run.settings
    rows: list[tuple[str, object]] = [
        ("started", utc(run.started_at)),
        ("model, version", f"{own.model}, {run.server.get('version') or '-'}"),
        ("target, precision", f"{own.target}, {(run.server.get('parameters') or {}).get('precision', '-')}"),
        ("endpoint", f"{own.over} at {own.place}"),
        ("inputs", Path(own.inputs).name + (", names of items" if own.names else "")),
        ("warm-up, measured", f"{own.warmup_s:g} s, {own.duration_s:g} s"),
        ("time-out", f"{own.timeout_s:g} s"),
        ("limit in flight", own.max_in_flight or IN_FLIGHT if own.open_loop else own.users),
    ]
    if own.replay is not None:
        replay = own.replay
        rows.append(("replay, speed", f"{Path(replay.file).name}, {replay.speed:g}"))
        rows.append(("requests, most in a second", f"{replay.requests:,}, {replay.peak_rps:g}"))
        rows.append(("SHA-256 of the file", replay.sha256))
    elif own.open_loop:
        rows.append(("arrivals, seed", f"{own.arrivals}, {own.seed}"))
    if own.mix:
        rows.append(("part of the mix", own.mix))
    return facts(rows)


def differing(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in _flat(run))
    rows = [
        (name, *(str(_flat(run).get(name, "-")) for run in runs))
        for name in names
        if len({str(_flat(run).get(name)) for run in runs}) > 1
    ]
    if not rows:
        return "<p>Settings, machine and versions do not differ.</p>"
    return f"<div class='scroll wrap'>{numbers(['', *names_of(runs)], rows)}</div>"


def _flat(run: Run) -> dict[str, object]:
    shown = {name: value for name, value in vars(run.settings).items() if name not in ("models", "inputs")}
    machine = {name: value for name, value in run.machine.items() if name != "versions"}
    server = {"version served": run.server.get("version"), **(run.server.get("parameters") or {})}
    return {**shown, **server, **machine, **run.machine.get("versions", {})}
