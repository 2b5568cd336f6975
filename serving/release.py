"""A new version beside the one that is served, through every gate, and then in its place: no request is lost.

The candidate is what `make engine` would publish, or the newest version of another repository (--new). It is laid out
beside the repository, where no server sees it, and takes one gate after the other:

    stage        a copy under the next number; nothing is released that is the same as what is served, or that was made
                 of other weights than parity would compare it with, and nothing over what make engine did not make
    doctor       manifest, digests and config.pbtxt, against this machine
    warm-up      a real server of its own loads it and runs its warm-up
    parity       over HTTP and gRPC against fp32 PyTorch (export.parity)
    accuracy     the task metric through that server, against what the served version has, within precision.max_drop
    shadow       the same requests to it and to a server over the version that is served (loadtests.shadow)
    objectives   the SLO under load, on both; the candidate has to hold every line (loadtests.run, loadtests.slo)
    switch       into the repository, under a steady load on the server that callers have (loadtests.steady)
    stack        alerts, dashboard and limits of a compose stack over that repository are made anew (serving.stack)

Contract: a version that fails a gate never comes into the repository; one that costs a request at the switch, or that
the server does not take, is taken out again; only after that is removed what is too old to go back to. Each step is in
`build/<model>/releases/` before the next begins (serving.releases); a kill leaves the old version serving. A server
follows the repository with `make serve POLL_S=2`; where none answers at the default address the version is put into the
repository, and a restart serves it.

Exit codes: 0 released; 1 a gate failed; 2 wrong input; 3 a gate could not tell. After 1, 2 and 3 the old one serves.

Examples:
    python -m serving.release --model recommender
    python -m serving.release --new ../candidate/model_repository --new-build ../candidate/build --url 127.0.0.1:8001
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    Manifest,
    Parser,
    PublishedManifest,
    Target,
    add_model_arguments,
    build_dir,
    run_command,
)
from deepseek.spec.repository import CONFIG
from serving.commands import Answer, SteadyLoad, ask
from serving.doctor import examine
from serving.embedded import EmbeddedServer, check_repository
from serving.live import Live, add_live_arguments, check_live_arguments
from serving.machine import Machine
from serving.releases import Journal, LeftOut, Outcome, Steps, alone, expect_anew, finish, last_number, rolled_back
from serving.repository import MANIFEST
from serving.versions import lay_out, newest, put_live, retire, same_as, stage, take_out

MOST_ATTEMPTS = 2  # of a load test that the generator spoiled
LEAST_REQUESTS = 200  # that loadtests.shadow tells anything from
SPARE = 1.2  # times the requests that a percentile needs: arrivals are random


class Release:
    """One candidate's way."""

    def __init__(
        self, args: argparse.Namespace, spec: DeploymentSpec, journal: Journal, number: int, live: Live
    ) -> None:
        self.args, self.spec, self.journal, self.number, self.live = args, spec, journal, number, live
        self.model = Path(args.repository) / args.model
        self.before = newest(self.model)
        self.scratch = journal.folder / "candidate"
        self.build = Path(args.new_build) / args.model if args.new_build else build_dir(args.model)
        self._which = ("--model", args.model, "--models", args.models)
        self._servers: dict[str, EmbeddedServer] = {}
        self._parity: dict[str, Any] = {}

    def run(self) -> None:
        """All gates, then the switch; raises what stopped it."""
        steps = Steps(self.journal, as_json=self.args.json)
        try:
            with ExitStack() as stack:
                steps.do("stage", self.stage)
                steps.do("doctor", self.doctor)
                steps.do("warm-up", lambda: self.start(stack))
                steps.do("parity", self.parity)
                steps.do("accuracy", self.accuracy)
                steps.do("shadow", lambda: self.shadow(stack))
                steps.do("objectives", self.objectives)
            steps.do("switch", self.switch)
            steps.do("stack", lambda: expect_anew(self.model.parent))
        except (GateFailed, InvalidMeasurement, InputError):
            self.journal.write(outcome="refused")
            raise
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def stage(self) -> str:
        """The candidate, laid out alone under its number."""
        if self.before is not None and not (self.model / str(self.before) / MANIFEST).is_file():
            raise InputError(
                f"{self.model / str(self.before)}: no {MANIFEST}, so it was not made by make engine and no candidate "
                "can be compared with it; publish into it once with make engine, without gates, or release into "
                "another repository (--repository, REPOSITORY=)"
            )
        if self.args.new:
            source = Path(self.args.new) / self.args.model
        else:
            flags = ("--target", self.args.target, "--repository", str(self.scratch / "built"), "--json")
            self._ask("export.to_triton", *flags).checked()
            source = self.scratch / "built" / self.args.model
        staged = stage(source, number=self.number, folder=self.scratch / "new")
        if self.before is not None and same_as(staged, self.number, self.model, self.before):
            what = f"the newest version in {source}" if self.args.new else "what is built"
            raise InputError(
                f"nothing to release: {self.model / str(self.before)} is the same as {what}; change the model or its "
                "deploy.toml, or name another repository (NEW=)"
            )
        self.journal.keep(MANIFEST, (staged / str(self.number) / MANIFEST).read_text())
        manifest = self._manifest(staged, self.number)
        if self.args.new:
            self._check_weights(manifest)
        said = f"version {self.number}, {manifest.precision} for {manifest.target}, from {self.args.new or 'the build'}"
        if record := rolled_back(self.args.model, manifest):
            said += f"; note: its files are those of version {record.before}, rolled back {record.started[:16]}"
        return said

    def _check_weights(self, manifest: PublishedManifest) -> None:
        """Raises InputError where parity would hold the candidate against another model than it was made from."""
        path = self.build / "fp32" / MANIFEST
        ours = Manifest.load(path).sources.get("weights", "") if path.is_file() else ""
        theirs = manifest.sources.get("weights", "")
        if not ours or ours != theirs:
            raise InputError(
                f"{self.args.new}: made of the weights {theirs[:12] or 'none'}, {path} has {ours[:12] or 'none'}, so "
                "parity would be with another model; name the build folder of its own (--new-build, NEW_BUILD=)"
            )

    def _ask(self, name: str, *flags: str) -> Answer:
        """Another room's command about this model, in the build folder that the candidate was made in."""
        return ask(name, *self._which, *flags, build=self.args.new_build)

    def doctor(self) -> str:
        """What speaks against it, from its files and this machine."""
        machine = Machine.detect(in_container=True)  # what Docker and the disk are like is no matter of the version's
        _, findings = examine(self.scratch / "new", machine, model=self.args.model, kept=False)
        self.journal.keep("doctor.json", [{"level": each.level, "said": str(each)} for each in findings])
        # Without the fix, which is about the copy.
        wrong = [f"{each.where}: {each.what}" for each in findings if each.level == "mismatch"]
        if wrong:
            raise GateFailed("; ".join(wrong))
        return f"{len(findings)} notes, no mismatch"

    def start(self, stack: ExitStack) -> str:
        """A server of its own, ready once the warm-up has run."""
        check_repository(self.scratch / "new")
        began_s = time.monotonic()
        try:
            self._servers["new"] = self._serve(stack, "new")
        except InputError as error:
            raise GateFailed(f"it does not come up: {error}") from None
        return f"ready after {time.monotonic() - began_s:.1f} s"

    def _serve(self, stack: ExitStack, side: str) -> EmbeddedServer:
        return stack.enter_context(
            EmbeddedServer(
                self.scratch / side,
                http_port=0,
                grpc_port=0,
                metrics_port=0,
                log_path=self.journal.folder / f"triton-{side}.log",
                timeout_s=self.args.start_timeout_s,
            )
        )

    def parity(self) -> str:
        """What it serves against fp32 PyTorch."""
        server = self._servers["new"]
        flags = ("--url", server.grpc_url, "--http-url", server.http_url, "--json")
        rows = ("--rows", str(self.args.parity_rows)) if self.args.parity_rows else ()
        answer = self._ask("export.parity", *flags, *rows)
        if answer.data is not None:
            self.journal.keep("parity.json", answer.data)
        self._parity = answer.checked()
        return f"{len(self._parity['checks'])} checks over HTTP and gRPC"

    def accuracy(self) -> str:
        """Its task metric against that of the version that is served: a build may be true to a model that is worse."""
        metric = self._parity["metric"]
        if not metric:
            return LeftOut("no precision.metric in deploy.toml")
        value = min(each["value"] for each in metric["served"].values())
        if self.before is None:
            return LeftOut(f"{metric['name']} {value:.4f}; nothing is served to compare with")
        served = self._recorded(metric["name"])
        if served is None:
            return LeftOut(f"{metric['name']} {value:.4f}; version {self.before} has none in its manifest")
        said = f"{metric['name']} {value:.4f}, version {self.before} has {served:.4f}"
        if not value >= served * (1 - metric["max_drop"]):
            raise GateFailed(f"{said}: it may lose {metric['max_drop']:.2%}")
        return said

    def shadow(self, stack: ExitStack) -> str:
        """The same requests to it and to a server over the version that is served."""
        if self.before is None:
            return LeftOut("nothing is served to compare with")
        lay_out(self.model, self.before, number=self.before, folder=self.scratch / "base")
        self._servers["base"] = self._serve(stack, "base")
        urls = ("--base-url", self._servers["base"].grpc_url, "--new-url", self._servers["new"].grpc_url)
        how = ("--requests", str(self.args.requests), "--threshold", str(self.args.threshold), "--json")
        found = self._ask("loadtests.shadow", *urls, *how)
        if found.data is None:
            found.checked()
        data = found.data
        self.journal.keep("shadow.json", data)
        if data["verdict"] == "fails":
            raise GateFailed("; ".join(data["failures"]))
        if data["verdict"] == "inconclusive":
            raise InvalidMeasurement(data["note"])
        median = data["latency"][0]
        same = [
            f"{name} {each['same']:.1%} the same" for name, each in data["outputs"].items() if each["same"] is not None
        ]
        speed = (
            f"p50 {median['new_ms']:.2f} ms, {median['ratio']:.2f} ({median['low']:.2f} to {median['high']:.2f}) times"
        )
        return f"{speed} version {self.before}'s; {', '.join(same)}"

    def objectives(self) -> str:
        """Every line of the SLO, under load, on both; the candidate's decide."""
        sides = [side for side in ("base", "new") if side in self._servers]
        judged = {side: self._judged(side) for side in sides}
        self.journal.keep("objectives.json", judged)
        base = {each["name"]: each for each in judged.get("base", {}).get("objectives", [])}
        said = "; ".join(_compared(each, base.get(each["name"])) for each in judged["new"]["objectives"])
        if judged["new"]["verdict"] == "violated":
            raise GateFailed(said)
        if judged["new"]["verdict"] != "holds":
            raise InvalidMeasurement("; ".join([*judged["new"]["problems"], said]))
        return said

    def _judged(self, side: str) -> dict[str, Any]:
        """A load test of one server, judged; made again where the generator was at fault."""
        url = self._servers[side].grpc_url
        how = ("--url", url, "--target", self.args.target, "--duration-s", str(self._duration_s()), "--json")
        rate = ("--rate", str(self.args.rate)) if self.args.rate else ()
        for attempt in range(1, MOST_ATTEMPTS + 1):
            answer = self._ask("loadtests.run", *how, *rate)
            made = answer.checked(3)
            if made is None:
                raise InvalidMeasurement(answer.reason)
            kept = self.journal.folder / f"run-{side}-{attempt}"
            shutil.move(made["run"], kept)  # else it were the latest run of the model
            if answer.code == 0:
                break
        verdict: dict[str, Any] = self._ask("loadtests.slo", "--run", str(kept), "--json").checked(1, 3)
        return verdict

    def _duration_s(self) -> int:
        """Long enough for what the SLO's percentiles need to be told."""
        lines = self.spec.slo.all_objectives()
        needed = 0.0
        for line in lines:
            rate = self.args.rate or line.rate_rps or self.spec.slo.rate_rps
            if line.percent is not None and rate:
                needed = max(needed, SPARE * math.log(0.01) / math.log(line.percent / 100) / rate)
        return max(self.args.duration_s, math.ceil(needed))

    def switch(self) -> str:
        """Into the repository, watched; taken out again where a request was lost or the server does not take it."""
        staged = self.scratch / "new" / self.args.model
        if self.live.version is None:
            put_live(staged, self.number, self.model, before=self.before)
            self._settle("in the repository")
            return f"in {self.model}; {self.live.absent}: it is served at the server's next start"
        try:
            with ExitStack() as stack:
                load = self._steady(stack)
                load.change()
                put_live(staged, self.number, self.model, before=self.before)
                found = load.result()
            self.journal.keep("switch.json", found)
            said = self.live.judged(found, self.number)
        except BaseException:
            self._take_back()
            raise
        self._settle("live")
        return said

    def _steady(self, stack: ExitStack) -> SteadyLoad:
        """A load on the server that callers have; begun again where a busy machine kept it from its times."""
        for attempt in range(1, MOST_ATTEMPTS + 1):
            flags = (*self._which, *self.live.load_flags(self.number))
            load = stack.enter_context(SteadyLoad(*flags, build=self.args.new_build))
            try:
                load.begin()
                break
            except InvalidMeasurement:  # nothing has been changed yet
                if attempt == MOST_ATTEMPTS:
                    raise
        return load

    def _take_back(self) -> None:
        """The version before again; what was refused is kept beside the journal."""
        ours, there = (place / MANIFEST for place in (self.journal.folder, self.model / str(self.number)))
        if self.before is not None and there.is_file() and there.read_bytes() == ours.read_bytes():
            take_out(self.model, self.number, back_to=self.before, archive=self.journal.folder / "withdrawn")
            self.journal.write(step="taken back", state="holds", said=self.live.back(self.before))

    def _settle(self, outcome: Outcome) -> None:
        """It stays: what is too old to go back to goes."""
        self.journal.write(outcome=outcome)
        for old in retire(self.model):
            self.journal.write(step=f"retired {old}", state="holds", said="too old to go back to")

    def _recorded(self, metric: str) -> float | None:
        """What the manifest of the version that is served says of a task metric."""
        if self.before is None or not (self.model / str(self.before) / MANIFEST).is_file():
            return None
        found: float | None = (self._manifest(self.model, self.before).accuracy or {}).get("metrics", {}).get(metric)
        return found

    def _manifest(self, model: Path, version: int) -> PublishedManifest:
        return PublishedManifest.load(model / str(version) / MANIFEST)


def _compared(line: dict[str, Any], base: dict[str, Any] | None) -> str:
    """An objective of the candidate beside the served version's."""
    beside = "" if base is None else f", served {_number(base['seen'])}"
    limit = f"{line['relation']} {_number(line['limit'])}"
    note = f", {line['note']}" if line["note"] and line["status"] != "holds" else ""
    return f"{line['name']} {_number(line['seen'])} ({limit}{beside}): {line['status']}{note}"


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.4g}"


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m serving.release")
    add_model_arguments(parser)
    parser.add_argument("--repository", default="model_repository", help="that is served (default: %(default)s)")
    parser.add_argument(
        "--new", metavar="REPOSITORY", help="whose newest version is released (default: what was built)"
    )
    parser.add_argument(
        "--new-build", metavar="BUILD", help="folder that --new was built in: weights, inputs (default: $BUILD)"
    )
    targets = get_args(Target)
    parser.add_argument("--target", choices=targets, default="onnxruntime", help="and its SLO (default: %(default)s)")
    add_live_arguments(parser)
    parser.add_argument("--rate", type=float, help="requests/s of the objectives (default: each that the SLO names)")
    parser.add_argument("--duration-s", type=int, default=30, help="at least, of the objectives (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1000, help="of the shadow load (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=10, help="%% that p50 may lose there (default: %(default)s)")
    parser.add_argument("--parity-rows", type=int, help="evaluation rows at most (default: all)")
    parser.add_argument("--start-timeout-s", type=float, default=300, help="to load and warm up (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the record as JSON at the end")
    args = parser.parse_args()
    for name in ("rate", "duration_s", "threshold", "parity_rows", "start_timeout_s"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value:g}: it must be more than 0")
    if args.requests < LEAST_REQUESTS:
        raise InputError(f"--requests {args.requests}: {LEAST_REQUESTS} or more are needed for an interval")
    if args.new_build and not args.new:
        raise InputError(f"--new-build {args.new_build}: it is that of another repository; name it (--new, NEW=)")
    check_live_arguments(args)
    return args


def main() -> None:
    """Releases one model."""
    args = _parse()
    spec = DeploymentSpec.of_model(args.model, args.models).for_target(args.target)
    if not (args.rate or spec.slo.rate_rps or any(line.rate_rps for line in spec.slo.all_objectives())):
        raise InputError(
            f"{args.model}: no rate to measure at; give --rate (RATE=), or rate_rps in [slo] of deploy.toml"
        )
    if args.rate and args.rate < (spec.slo.rate_rps or 0):
        raise InputError(f"--rate {args.rate:g}: rate_rps = {spec.slo.rate_rps:g} of the SLO is not told from fewer")
    if Path(args.repository).exists() and not Path(args.repository).is_dir():
        raise InputError(f"{args.repository}: not a folder; name the model repository that is served (REPOSITORY=)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: servers and load end, too
    with alone(args.model) as releases:
        model = Path(args.repository) / args.model
        if newest(model) is not None and not (model / CONFIG).is_file():
            raise InputError(f"{model / CONFIG}: no such file; publish it again: make engine")
        live = Live.find(args, newest(model))
        number = last_number(args.model, model) + 1
        for left in releases.glob("*/candidate"):  # of a release that was killed
            shutil.rmtree(left)
        journal = Journal(releases, "release", number, before=newest(model))
        try:
            Release(args, spec, journal, number, live).run()
        finally:
            finish(journal, args.model, as_json=args.json)


if __name__ == "__main__":
    run_command(main)
