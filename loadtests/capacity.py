"""Finds the highest rate at which a server holds every objective of its SLO.

Contract: `loadtests.search` says which rates are tried, `loadtests.trial` makes and judges each. The result takes its
place as `build/<model>/capacity.json`, whole or not at all (`Capacity.load` reads it back); until then what was
measured is in `capacity.part.json`, from which the same command goes on within the hour. The runs of the trials are
kept under `build/<model>/capacity/`. What an objective means at each rate: docs/capacity.md.

Exit codes: 0 found and confirmed; 1 no rate holds, or less than the SLO itself asks for; 2 wrong input, no server;
3 inconclusive: the generator was the limit ("at least"), a bound was reached, or no run confirmed it.

Examples:
    python -m loadtests.capacity                                # gRPC at 127.0.0.1:8001
    python -m loadtests.capacity --protocol http --url 127.0.0.1:8000 --duration-s 60
    python -m loadtests.capacity --start-rps 400 --max-s 300 --json
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from deepseek_client import ModelMetadata
from rich.console import Console

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    Parser,
    SloSpec,
    Target,
    build_dir,
    run_command,
)
from loadtests.check import check
from loadtests.endpoint import add_endpoint_arguments, endpoint_of, inputs_of
from loadtests.knee import table, trial_line
from loadtests.limits import add_timeout_argument
from loadtests.results import Run, Settings
from loadtests.saved import Saved
from loadtests.search import CONFIRM_LONGER, GENERATOR, INTERRUPTED, SAMPLES, UNDECIDED, Attempt, Found, Plan, Search
from loadtests.slo import SIGNS, formatted
from loadtests.trial import (
    DEFAULT_START_RPS,
    Phase,
    Served,
    Trial,
    Trials,
    bound_rates,
    quality_of,
    required_rps,
    seconds_needed,
    served_settings,
)

ALIKE = ("arrivals", "warmup_s", "timeout_s", "max_in_flight", "workers", "inputs")
RESUMABLE_S = 3600  # after that the server and its machine may be others


class Capacity(Saved):
    """What a search found, as `capacity.json` has it."""

    made_by: ClassVar[str] = "make capacity"
    schema_version: Literal[1] = 1
    model: str
    target: Target
    precision: str | None
    """Of what is served; null where the server does not say."""
    served_versions: tuple[str, ...] = ()
    """Of the model."""
    url: str
    protocol: Literal["grpc", "http"]
    objectives: tuple[str, ...]
    trials: tuple[Trial, ...] = ()
    """In the order in which they were made."""
    capacity_rps: float | None = None
    """The highest rate that holds every objective; with `limited_by` "generator", at least that."""
    first_failing_rps: float | None = None
    """The lowest rate above it that was seen to fail."""
    confirmed: bool = False
    """A longer run held at `capacity_rps`."""
    limited_by: str = INTERRUPTED
    """The objectives that fail above it; or generator, samples, time, trials, interrupted."""
    required_rps: float | None = None
    """What the SLO itself asks for."""
    settings: Served = Served()
    trial_settings: dict[str, Any] = {}
    """What all trials have in common: arrivals, warm-up, time-out, workers, inputs."""
    machine: dict[str, Any] = {}
    """The generator's; the server's, too, where the URL is a local one."""
    versions: dict[str, str] = {}
    started: str
    """UTC."""

    def with_found(self, found: Found) -> Capacity:
        """The same with how the search ended."""
        return self.model_copy(update={name: getattr(found, name) for name in Found.__dataclass_fields__})

    @property
    def exit_code(self) -> int:
        """0 found, confirmed and enough; 1 none, or too little; 3 not to be said."""
        held = any(trial.outcome == "holds" for trial in self.trials)
        if self.limited_by in UNDECIDED or (held and not self.confirmed):
            return 3
        return int(self.capacity_rps is None or self.capacity_rps < (self.required_rps or 0))

    @property
    def sentence(self) -> str:
        """The result in a line."""
        rate = "" if self.capacity_rps is None else f"{self.capacity_rps:g}/s"
        if self.limited_by == GENERATOR:
            least = f"at least {rate}{'' if self.confirmed else ', not confirmed'}" if rate else "not to be said"
            return f"capacity {least}; the generator, not the server, is the limit: see the trials that are invalid"
        if self.limited_by in UNDECIDED:
            what = "too few samples" if self.limited_by == SAMPLES else f"the limit on {self.limited_by} was reached"
            return f"capacity {f'at least {rate}, not confirmed' if rate else 'not to be said'}: {what}"
        if self.capacity_rps is None and self.exit_code == 3:
            return f"capacity not to be said: no longer run confirmed what held for a while ({self.limited_by})"
        if self.capacity_rps is None:
            return f"no rate holds, down to {min(each.rate_rps for each in self.trials):g}/s: {self.limited_by}"
        wanted = f"; the SLO asks for {self.required_rps:g}/s" if self.required_rps else ""
        fails = f" (fails at {self.first_failing_rps:g}/s)" if self.first_failing_rps else ""
        return f"capacity {rate}, limited by {self.limited_by}{fails}{wanted}"


def capacity_path(model: str) -> Path:
    """Where the latest result lies."""
    return build_dir(model) / "capacity.json"


class KeptTrials:
    """Keeps every trial on disk as it is made, and gives those of a search that was cut off again."""

    def __init__(self, head: Capacity, attempt: Attempt, say: Callable[[Trial, bool], None], *, fresh: bool) -> None:
        self.path = capacity_path(head.model).with_suffix(".part.json")
        self.so_far = head
        self._attempt, self._say = attempt, say
        self._earlier: list[Trial] = []
        if not fresh and (part := self._interrupted()):
            self._earlier = list(part.trials)
            self.so_far = part.model_copy(update={"trials": ()})

    def _interrupted(self) -> Capacity | None:
        """A search for the same that was cut off not long ago."""
        try:
            part = Capacity.load(self.path)
            recent = time.time() - self.path.stat().st_mtime < RESUMABLE_S
        except (OSError, InputError):
            return None
        ours = {"trials": (), "started": self.so_far.started, "machine": {}, "versions": {}}
        return part if recent and part.model_copy(update=ours) == self.so_far else None

    def __call__(self, rate_rps: float, phase: Phase, duration_s: float, seed: int) -> Trial:
        """The trial that was made already, or a new one."""
        earlier = self._earlier.pop(0) if self._earlier else None
        if earlier and (earlier.rate_rps, earlier.phase, earlier.duration_s) == (rate_rps, phase, duration_s):
            self._add(earlier)
            self._say(earlier, True)
            return earlier
        self._earlier = []
        trial = self._attempt(rate_rps, phase, duration_s, seed)
        self._add(trial, **_whereabouts(trial))
        self._say(trial, False)
        return trial

    def _add(self, trial: Trial, **known: Any) -> None:
        self.so_far = self.so_far.model_copy(update={"trials": (*self.so_far.trials, trial), **known})
        self.so_far.save(self.path)


def _whereabouts(trial: Trial) -> dict[str, Any]:
    """The machine and the versions that a trial was made with."""
    if not trial.run:
        return {}
    machine = dict(Run.load(trial.run).machine)
    return {"versions": machine.pop("versions", {}), "machine": machine}


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m loadtests.capacity")
    add_endpoint_arguments(parser)
    parser.add_argument(
        "--duration-s",
        type=float,
        default=30,
        help=f"of the confirming run; a trial has 1/{CONFIRM_LONGER}; both last longer where the rate "
        "gives too few samples (default: %(default)s)",
    )
    parser.add_argument("--warmup-s", type=float, default=2, help="of each trial (default: %(default)s)")
    add_timeout_argument(parser)
    parser.add_argument("--start-rps", type=float, help="first rate to try (default: the SLO's lowest)")
    parser.add_argument("--max-trials", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--max-s", type=float, default=1200, help="longest time in all (default: %(default)s)")
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that send; -1: one a core (default: 1)")
    parser.add_argument("--max-in-flight", type=int, help="a worker (default: 512, or as SLO and rate need)")
    parser.add_argument("--inputs", help="file of real inputs (default: build/<model>/evaluation.npz)")
    parser.add_argument("--fresh", action="store_true", help="do not take up a search that was cut off")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    for name in ("duration_s", "start_rps", "max_trials", "max_s"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {value:g}: it must be more than 0")
    return args


def plan_of(args: argparse.Namespace, spec: DeploymentSpec) -> Plan:
    """Where to start, and what bounds the search."""
    stops = tuple(bound_rates(spec.slo))
    start = args.start_rps or min([*stops, *([spec.slo.rate_rps] if spec.slo.rate_rps else [])], default=None)
    return Plan(
        start_rps=min([start or DEFAULT_START_RPS, *stops]),
        duration_s=args.duration_s / CONFIRM_LONGER,
        stops_rps=stops,
        max_trials=args.max_trials,
        max_s=args.max_s,
        needed_s=lambda rate_rps: seconds_needed(spec.slo, rate_rps),
    )


def _settings(args: argparse.Namespace, slo: SloSpec, rate_rps: float) -> Settings:
    inputs = args.inputs or inputs_of(args.model)
    return Settings(model=args.model, inputs=inputs, rate_rps=rate_rps, duration_s=1.0, **endpoint_of(args, slo))


def head_of(spec: DeploymentSpec, settings: Settings, served: ModelMetadata) -> Capacity:
    """What is known before the first trial."""
    lines = spec.slo.all_objectives()
    written = {line.name: f"{line.name} {SIGNS[line.relation]} {formatted(line.kind, line.limit)}" for line in lines}
    simple = [text for name, text in written.items() if name in type(spec.slo).model_fields]
    return Capacity(
        model=settings.model,
        target=settings.target,
        precision=served.parameters.get("precision"),
        served_versions=served.versions,
        url=settings.url,
        protocol=settings.protocol,
        objectives=(*simple, *spec.slo.objectives),
        required_rps=required_rps(spec.slo),
        settings=served_settings(settings, served),
        trial_settings={name: getattr(settings, name) for name in ALIKE},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def find(head: Capacity, plan: Plan, attempt: Attempt, console: Console, *, fresh: bool = False) -> Capacity:
    """Searches, and puts the result in its place; Ctrl-C leaves what was measured so far."""

    def say(trial: Trial, again: bool) -> None:
        console.print(trial_line(trial, again), soft_wrap=True)

    kept = KeptTrials(head, attempt, say, fresh=fresh)
    try:
        found = Search(plan, kept).run()
    except BaseException:
        if kept.so_far.trials:
            console.print(table(kept.so_far.trials, None))
            console.print(f"so far: {kept.path}; the same command goes on from there", soft_wrap=True)
        raise
    capacity = kept.so_far.with_found(found)
    capacity.save(capacity_path(head.model))
    kept.path.unlink(missing_ok=True)
    return capacity


def main() -> int:
    """Checks, searches, saves, prints."""
    args = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: cleanly
    spec = DeploymentSpec.of_model(args.model, args.models).for_target(args.target)
    plan = plan_of(args, spec)
    settings = _settings(args, spec.slo, plan.start_rps)
    served = check(replace(settings, duration_s=float(max(1, round(plan.duration_s)))), spec)
    violated, unknown = quality_of(spec, settings, served)
    if violated:
        raise GateFailed(f"{'; '.join(violated)}: no rate holds every objective, whatever the load")
    console = Console(stderr=True, markup=False)
    head = head_of(spec, settings, served)
    console.print(f"{head.model} over {head.protocol} at {head.url}: {', '.join(head.objectives)}", soft_wrap=True)
    for line in unknown:
        console.print(f"note: {line} is left out, nothing measured it for what is served; make compare", soft_wrap=True)
    folder = build_dir(args.model) / "capacity" / head.started.replace(":", "-").replace("+00-00", "Z")
    trials = Trials(spec=spec, settings=settings, served=served, folder=folder, console=console)
    capacity = find(head, plan, trials, console, fresh=args.fresh)
    if args.json:
        print(capacity.model_dump_json(indent=2))
    else:
        Console(width=max(Console().width, 100), markup=False).print(table(capacity.trials, capacity.capacity_rps))
        Console(markup=False).print(capacity.sentence, style="bold", soft_wrap=True)
        print(capacity_path(args.model))
    return capacity.exit_code


if __name__ == "__main__":
    run_command(main)
