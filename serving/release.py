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
follows the repository with `make serve POLL_S=2`; where nothing listens at the default address the version is put into
the repository, and a restart serves it.

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
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    Parser,
    Target,
    add_model_arguments,
    run_command,
)
from deepseek.spec.repository import CONFIG
from serving.candidate import MOST_ATTEMPTS, Candidate
from serving.commands import SteadyLoad
from serving.live import Live, add_live_arguments, check_live_arguments
from serving.releases import Journal, Outcome, Steps, alone, expect_anew, finish, last_number
from serving.repository import MANIFEST
from serving.versions import brought, newest, put_live, retire

LEAST_REQUESTS = 200  # that loadtests.shadow tells anything from


class Release:
    """One candidate's way."""

    def __init__(self, candidate: Candidate, live: Live) -> None:
        self.candidate, self.live = candidate, live
        self.args, self.journal, self.number = candidate.args, candidate.journal, candidate.number
        self.model, self.before = candidate.model, candidate.before

    def run(self) -> None:
        """All gates, then the switch; raises what stopped it."""
        steps = Steps(self.journal, as_json=self.args.json)
        new = self.candidate
        try:
            with ExitStack() as servers:
                steps.do("stage", new.stage)
                steps.do("doctor", new.doctor)
                steps.do("warm-up", lambda: new.start(servers))
                steps.do("parity", new.parity)
                steps.do("accuracy", new.accuracy)
                steps.do("shadow", lambda: new.shadow(servers))
                steps.do("objectives", new.objectives)
            steps.do("switch", self.switch)
            steps.do("stack", lambda: expect_anew(self.model.parent))
        except (GateFailed, InvalidMeasurement, InputError):
            self.journal.write(outcome="refused")
            raise
        finally:
            shutil.rmtree(new.scratch, ignore_errors=True)

    def switch(self) -> str:
        """Into the repository, watched; taken out again where a request was lost or the server does not take it."""
        if self.live.version is None:
            self.live = Live.find(self.args, self.before)  # one may have been started since
        if self.live.version is None:
            put_live(self.candidate.folder, self.number, self.model, before=self.before)
            self._settle("in the repository")
            return f"in {self.model}; {self.live.absent}: it is served at the server's next start"
        try:
            with brought(self.candidate.folder, self.model) as near, ExitStack() as stack:
                load = self._steady(stack)
                load.change()
                put_live(near, self.number, self.model, before=self.before)
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
            flags = (*self.candidate.which, *self.live.load_flags(self.number))
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
            self.journal.withdraw(self.model, self.number, back_to=self.before, outcome="refused")
            self.journal.write(step="taken back", state="holds", said=self.live.back(self.before))

    def _settle(self, outcome: Outcome) -> None:
        """It stays: what is too old to go back to goes."""
        self.journal.write(outcome=outcome)
        for old in retire(self.model):
            self.journal.write(step=f"retired {old}", state="holds", said="too old to go back to")


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
    lines = spec.slo.all_objectives()
    if not (args.rate or spec.slo.rate_rps or any(line.rate_rps or line.kind == "throughput" for line in lines)):
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
        where = str(Path(args.repository).resolve())
        journal = Journal(releases, "release", number, before=newest(model), repository=where)
        try:
            Release(Candidate(args, spec, journal, number), live).run()
        finally:
            finish(journal, args.model, as_json=args.json)


if __name__ == "__main__":
    run_command(main)
