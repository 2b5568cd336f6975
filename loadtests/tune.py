"""Finds the batch size, queue delay, instances and threads that serve the SLO best on this machine.

Every setting is published as `make engine` publishes it, served by a real server of its own and loaded as the load
tests load it. What is looked for is the highest rate that holds the SLO and, among settings within noise of it, the
lowest p99. One thing is varied at a time from the best so far, until a round finds nothing new; a setting that falls
behind the best so far is stopped early. The best is then held against the default of `deploy.toml` in interleaved
pairs: only where the confidence interval of the gain lies above 1 is it written, to the file that the key `tuned` of
`deploy.toml` names. `make engine` publishes it.

Contract: what was measured is in `build/<model>/tuning/` as soon as it is measured, and the same command goes on from
there after a kill; the result is `build/<model>/tuning.json` (`loadtests.tuning.Tuning`). See docs/tuning.md.

Exit codes: 0 the search has ended, whether or not something is better; 2 wrong input; 3 nothing can be concluded: the
load generator was the limit, no setting answers, or the time was up before anything was tried or confirmed.

Examples:
    python -m loadtests.tune                                            # the recommender, within 20 minutes
    python -m loadtests.tune --model minilm --max-s 3600 --pairs 10
    python -m loadtests.tune --max-batch 1,8,32 --instances 2 --threads 1 --delay-us 0 --dry-run
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table as Columns

from deepseek.spec import (
    DeploymentSpec,
    FileDigest,
    InputError,
    InvalidMeasurement,
    Parser,
    Precision,
    PublishedManifest,
    SloSpec,
    Target,
    TunedFile,
    add_model_arguments,
    build_dir,
    run_command,
)
from loadtests.contender import Place, publish
from loadtests.journal import Journal
from loadtests.limits import add_timeout_argument, timeout_for
from loadtests.local_server import EMBEDDED, NotServed
from loadtests.results import Settings
from loadtests.slo import SIGNS, formatted
from loadtests.space import space_of
from loadtests.tuner import LEAST_PAIRS, Tuner, shown_capacity, shown_ms, verdict
from loadtests.tuning import Setting, TriedSetting, Tuning, tuning_path, with_front


def concluded(tuner: Tuner, head: dict[str, Any], best: TriedSetting) -> Tuning:
    """Confirms the best, where it is not the default, and says what follows."""
    journal = tuner.journal
    facts = {**head, "trials": (), "reference_rps": journal.reference_rps, "started": journal.started}
    machine = dict(journal.machine)
    facts |= {"versions": machine.pop("versions", {}) | head["versions"], "machine": machine}
    others = len(journal.tried) - 1
    if best.settings == tuner.default:
        if tuner.cut_short and not others:
            raise InvalidMeasurement(
                "the time was up before anything but the default was tried; --max-s gives it longer"
            )
        undecided = [each.settings for each in journal.tried.values() if each.at_least and each != best]
        if best.at_least and undecided:
            raise InvalidMeasurement(
                f"the load generator was the limit: the default holds {best.capacity_rps:g}/s or more, and so may "
                f"{undecided[0]}{f' and {len(undecided) - 1} others' if undecided[1:] else ''}; give the generator "
                "cores of its own"
            )
        facts["conclusion"] = f"nothing better than the default was found ({others} others were tried)"
    else:
        pairs = tuner.confirm(best)
        if len(pairs) < min(LEAST_PAIRS, tuner.pairs):
            left_out = f"the last pair that was left out: {tuner.left_out}"
            why = left_out if tuner.left_out else "the time was up, --max-s gives it longer"
            raise InvalidMeasurement(
                f"{best.settings} was not confirmed ({len(pairs)} of {tuner.pairs} pairs): {why}; the same command "
                "goes on from there"
            )
        gain, better = verdict(pairs)
        said = f"{best.settings}: {gain}"
        if journal.tried[tuner.default].capacity_rps is None:
            said += ", or more: the search found no rate that the default holds"
        facts |= {"pairs": tuple(pairs), "candidate": best.settings, "gain": gain}
        facts["best"] = best.settings if better else None
        facts["conclusion"] = said if better else f"nothing is proved better than the default; the nearest, {said}"
    if tuner.cut_short:
        facts["conclusion"] += "; the time was up before all were tried, the same command goes on from there"
    return Tuning(**facts | {"trials": with_front(journal.tried.values())})


def check_writable(path: Path, console: Console) -> None:
    """Whether what the search will find can be written: InputError where not, a note where it is over a broken file."""
    reason = "it is a folder" if path.is_dir() else ""
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        hint = "the tuned values of deploy.toml are to lie there: let it be written, or search with --dry-run"
        raise InputError(f"{path}: cannot be written: {reason}; {hint}")
    try:
        TunedFile.read(path)
    except InputError as error:
        console.print(f"note: {error}; it will be kept as {_broken(path)}, and made anew", soft_wrap=True)


def _broken(path: Path) -> Path:
    """Where a file of tuned values is kept that cannot be read: those of other targets are in it."""
    return path.with_suffix(".toml.broken")


def _tuned_file(path: Path) -> TunedFile:
    """What it holds; nothing where that cannot be read: then it is moved out of the way, to be made anew."""
    try:
        return TunedFile.read(path)
    except InputError:
        path.replace(_broken(path))
        return TunedFile()


def apply(tuning: Tuning, place: Place, deploy_toml: Path, dry_run: bool) -> Tuning:
    """Writes the best to where deploy.toml says that tuned values live."""
    if tuning.best is None or dry_run:
        return tuning
    if place.spec.tuned is None:
        hint = f'not written: {deploy_toml} names no file for it; add tuned = "tuned.toml" at its top'
        return tuning.model_copy(update={"conclusion": f"{tuning.conclusion}; {hint}"})
    path = deploy_toml.parent / place.spec.tuned
    where = f"{tuning.machine.get('cpu', platform.machine())}, {tuning.machine.get('cores', os.cpu_count())} cores"
    measured = f"{tuning.started}, {where}, {tuning.precision}, {', '.join(tuning.objectives)}: {tuning.gain}"
    _tuned_file(path).with_target(tuning.target, tuning.best.tuned(measured)).write(path)
    hint = f"written to {path}; make engine MODEL={tuning.model} publishes it"
    if tuning.best.max_batch < tuning.default.max_batch:
        hint += f"; from then on a request of more than {tuning.best.max_batch} rows is refused"
    return tuning.model_copy(update={"applied": True, "conclusion": f"{tuning.conclusion}; {hint}"})


def table(tuning: Tuning) -> Columns:
    """Every setting, the highest rate first, the front of throughput and p99 marked."""
    columns = Columns(
        "", "instances", "threads", "batch", "delay", "holds", f"{tuning.users} in flight", "p50", "p99", ""
    )
    for tried in sorted(tuning.trials, key=lambda each: (-(each.capacity_rps or 0), -each.throughput_rps)):
        setting = tried.settings
        name = {tuning.default: "default", tuning.best: "best"}.get(setting, "")
        mark = f"{'◆' if tried.pareto else ' '} {name}"
        shape = (setting.instances, setting.threads or "-", setting.max_batch, f"{setting.max_queue_delay_us} us")
        graphs = "CUDA graphs " if setting.cuda_graphs else ""
        figures = (
            shown_capacity(tried),
            f"{tried.throughput_rps:.1f}/s",
            shown_ms(tried.p50_ms),
            shown_ms(tried.p99_ms),
        )
        columns.add_row(mark, *map(str, shape), *figures, f"{graphs}{tried.reason}", style="bold" if name else None)
    return columns


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; InputError where a number cannot be."""
    parser = Parser(__doc__, prog="python -m loadtests.tune")
    add_model_arguments(parser)
    parser.add_argument("--target", choices=get_args(Target), default="onnxruntime", help="(default: %(default)s)")
    parser.add_argument(
        "--precision", choices=get_args(Precision), help="to tune for (default: what export.compare chose)"
    )
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="(default: %(default)s)")
    parser.add_argument("--max-s", type=float, default=1200, help="longest time in all (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=6, help="of default and best, at most (default: %(default)s)")
    parser.add_argument("--users", type=int, default=32, help="in flight in the closed loop (default: %(default)s)")
    parser.add_argument("--least-s", type=float, default=5, help="length of a trial at least (default: %(default)s)")
    parser.add_argument(
        "--resolution", type=float, default=1.05, help="factor to which rates are pinned down (default: %(default)s)"
    )
    parser.add_argument("--warmup-s", type=float, default=1, help="of each trial (default: %(default)s)")
    add_timeout_argument(parser)
    parser.add_argument("--max-batch", type=numbers, metavar="N,...", help="batch sizes to try")
    parser.add_argument("--delay-us", type=numbers, metavar="N,...", help="queue delays to try")
    parser.add_argument("--instances", type=numbers, metavar="N,...", help="instance counts to try")
    parser.add_argument("--threads", type=numbers, metavar="N,...", help="ONNX Runtime threads of an instance to try")
    parser.add_argument("--server", help="command of the server, with {repository}, {http_port}, {grpc_port} and "
                        "{metrics_port} (default: the embedded Triton)")  # fmt: skip
    parser.add_argument("--inputs", help="file of real inputs (default: build/<model>/evaluation.npz)")
    parser.add_argument("--fresh", action="store_true", help="do not take up a search that was cut off")
    parser.add_argument("--dry-run", action="store_true", help="measure and say, but write no tuned values")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(arguments)
    for name, least in (("max_s", 0), ("pairs", 2), ("users", 1), ("least_s", 1), ("timeout_s", 0), ("warmup_s", 0)):
        value = getattr(args, name)
        if value is None:
            continue
        if not least <= value < float("inf") or (name in ("max_s", "timeout_s") and not value):
            needed = "more than 0" if name in ("max_s", "timeout_s") else f"{least} or more"
            raise InputError(f"--{name.replace('_', '-')} {value:g}: it must be {needed}")
    if not 1.01 <= args.resolution <= 2:
        raise InputError(f"--resolution {args.resolution:g}: 1.01 to 2 are possible")
    return args


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    return tuple(int(part) for part in text.split(","))


def _server(args: argparse.Namespace) -> str:
    if args.server is None and args.target != "onnxruntime":
        raise InputError(
            f"--target {args.target}: the embedded Triton cannot serve it; give the command of a server that can, with "
            "--server 'docker run ... {repository} ... {http_port} ... {grpc_port} ... {metrics_port}' (docs/tuning.md)"
        )
    return args.server or EMBEDDED


def place_of(args: argparse.Namespace, folder: Path, console: Console) -> Place:
    """Where and how everything is measured."""
    spec = DeploymentSpec.of_model(args.model, args.models, tuned=os.devnull).for_target(args.target)
    settings = Settings(
        model=args.model,
        models=args.models,
        target=args.target,
        protocol=args.protocol,
        url="",
        inputs=args.inputs or str(build_dir(args.model) / "evaluation.npz"),
        warmup_s=args.warmup_s,
        timeout_s=timeout_for(args.timeout_s, spec.slo),
    )
    return Place(
        spec=spec,
        settings=settings,
        precision=args.precision,
        server=_server(args),
        folder=folder,
        least_s=args.least_s,
        console=console,
    )


def facts_of(args: argparse.Namespace, place: Place, manifest: PublishedManifest) -> dict[str, Any]:
    """What a measurement is about: where one of these is another, it does not count any more."""
    names = ("locust", "nvidia-pytriton", "onnxruntime", "tritonclient")
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return {
        "spec": place.spec.model_facts(),
        "slo": place.spec.slo.model_dump(),
        "batching": place.spec.batching.model_dump(),
        "target": place.settings.target,
        "engine": {name: digest.sha256 for name, digest in sorted(manifest.files.items()) if name != "config.pbtxt"},
        "machine": {"node": platform.node(), "cores": len(os.sched_getaffinity(0))},
        "versions": {name: installed[name] for name in names if name in installed},
        "inputs": FileDigest.of(inputs).sha256 if (inputs := Path(place.settings.inputs)).is_file() else None,
        "space": [args.max_batch, args.delay_us, args.instances, args.threads],
        "measured by": [args.protocol, args.users, args.resolution, place.server],
        "seconds": [args.least_s, args.warmup_s, place.settings.timeout_s],
    }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuses a second search over the same model; takes away what a killed one left."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another search is at work in {folder}; two would disturb each other") from None
        for left in ("trial", "default", "best", "published"):
            shutil.rmtree(folder / left, ignore_errors=True)
        yield


def objectives_of(slo: SloSpec) -> tuple[str, ...]:
    """The SLO's lines: those of the simple keys as they would be written, then its own."""
    simple = [line for line in slo.all_objectives() if line.name in SloSpec.model_fields]
    written = (f"{line.name} {SIGNS[line.relation]} {formatted(line.kind, line.limit)}" for line in simple)
    return (*written, *slo.objectives)


def tune(args: argparse.Namespace, console: Console) -> Tuning:
    """Searches, confirms, writes."""
    ends_at = time.monotonic() + args.max_s
    folder = build_dir(args.model) / "tuning"
    place, deploy_toml = place_of(args, folder, console), Path(args.models) / args.model / "deploy.toml"
    if place.spec.tuned is not None and not args.dry_run:
        check_writable(deploy_toml.parent / place.spec.tuned, console)
    cores = len(os.sched_getaffinity(0))
    default = Setting.of(place.spec, args.target, cores)
    space = space_of(place.spec, args.target, cores, args.max_batch, args.delay_us, args.instances, args.threads)
    with _alone(folder):
        try:
            manifest = publish(default, place, folder / "published")
        except NotServed as error:
            raise InputError(str(error)) from None
        finally:
            shutil.rmtree(folder / "published", ignore_errors=True)
        journal = Journal(folder / "journal.jsonl", facts_of(args, place, manifest), fresh=args.fresh)
        if journal.changed:
            console.print(f"an earlier search had another {', '.join(journal.changed)}: starting anew")
        if journal.resumed:
            console.print(f"going on with the search of {journal.started}: {journal.resumed} settings are known")
        else:
            shutil.rmtree(folder / "runs", ignore_errors=True)
        tuner = Tuner(
            place=place,
            default=default,
            space=space,
            journal=journal,
            users=args.users,
            pairs=args.pairs,
            ends_at=ends_at,
            confirm_s=args.max_s / 2,
            resolution=args.resolution,
        )
        head = {
            "model": args.model,
            "target": args.target,
            "precision": manifest.precision,
            "objectives": objectives_of(place.spec.slo),
            "default": default,
            "users": args.users,
            "versions": dict(manifest.versions),
        }
        tuning = concluded(tuner, head, tuner.search())
        tuning.save(tuning_path(args.model))  # whatever becomes of the file of tuned values
        tuning = apply(tuning, place, deploy_toml, args.dry_run)
        tuning.save(tuning_path(args.model))
        if not tuner.cut_short:
            journal.path.unlink()
    return tuning


def main() -> int:
    """Searches and prints what was found."""
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: cleanly
    tuning = tune(args, Console(stderr=True, markup=False))
    if args.json:
        print(tuning.model_dump_json(indent=2))
    else:
        console = Console(width=max(Console().width, 110), markup=False)
        console.print(table(tuning))
        console.print(f"p50 and p99 at {tuning.reference_rps:g}/s; ◆ the front of throughput and p99")
        console.print(tuning.conclusion, style="bold", soft_wrap=True)
        print(tuning_path(tuning.model))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run_command(main)
