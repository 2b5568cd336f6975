"""The command `release`: takes a new version through every gate, then switches the live server to it.

The candidate is what `make engine` would publish, or the newest version of another repository (--new). docs/release.md
says what each gate refuses.

Contract: a version that fails a gate never enters the repository. If a request fails at the switch, or the server
refuses the version, it is taken out again. Versions too old for a rollback are removed only after that. Each step is in
`build/<model>/releases/` before the next begins (serving.release.journal); after a kill the old version keeps serving.
"""

import argparse
import shutil
import sys
import time
from contextlib import ExitStack

from deepseek.spec import DeploymentSpec, GateFailed, InputError, InvalidMeasurement, Objective
from deepseek.spec.command import end_at_sigterm
from deepseek.spec.files.released import WITHDRAWN, last_number
from deepseek.spec.files.repository import CONFIG
from deepseek.spec.files.version_files import retire
from serving.release.candidate import MOST_ATTEMPTS, Candidate
from serving.release.gate_commands import SteadyLoad
from serving.release.history import finish
from serving.release.journal import Outcome, ReleaseJournal, exclusive
from serving.release.live_server import LiveServer, use_local_port
from serving.release.step_runner import StepRunner, refresh_stack
from serving.release.versions import beside_repository, move_in, move_out_first, newest
from serving.repository.checks import MANIFEST


class Release:
    def __init__(self, candidate: Candidate, live: LiveServer) -> None:
        self.candidate, self.live = candidate, live
        self.options, self.journal, self.number = candidate.options, candidate.journal, candidate.number
        self.model, self.before = candidate.model, candidate.before

    def run(self) -> None:
        """Runs all gates, then the switch; raises the error that stopped the release."""
        steps = StepRunner(self.journal, as_json=self.options.json)
        new = self.candidate
        try:
            with new.started:
                steps.do("stage", new.stage)
                steps.do("doctor", new.doctor)
                if new.spec.vocabulary:
                    steps.do("catalogue", new.catalogue)
                steps.do("warm-up", new.start)
                steps.do("parity", new.parity)
                steps.do("accuracy", new.accuracy)
                steps.do("shadow", new.shadow)
                steps.do("objectives", new.objectives)
            steps.do("switch", self.switch)
            steps.do("stack", lambda: refresh_stack(self.model.parent))
        except (GateFailed, InvalidMeasurement, InputError):
            self.journal.write(outcome="refused")
            raise
        finally:
            shutil.rmtree(new.scratch, ignore_errors=True)

    def switch(self) -> str:
        """Moves the candidate into the repository under load; takes it out again if a request or the switch fails."""
        if self.live.version is None:
            self.live = LiveServer.find(self.options, self.before)  # one may have been started meanwhile
        if self.live.absent:
            move_in(self.candidate.folder, self.number, self.model, before=self.before)
            self._settle("in the repository")
            return f"in {self.model}; {self.live.absent}: it is served at the server's next start"
        if self.before is None:
            return self._first()
        try:
            with beside_repository(self.candidate.folder, self.model) as near, ExitStack() as stack:
                load = self._steady(stack)
                load.change()
                move_in(near, self.number, self.model, before=self.before)
                found = load.result()
            self.journal.keep("switch.json", found)
            said = self.live.judged(found, self.number)
        except BaseException:
            self._take_back()
            raise
        self._settle("live")
        return said

    def _first(self) -> str:
        """Moves the first version of a model into the repository; takes it out again if the server does not load it."""
        began_s = time.monotonic()
        try:
            move_in(self.candidate.folder, self.number, self.model, before=None)
            seen, reason = self.live.wait_for(self.number, self.options.switch_s)
            if seen != self.number:
                raise InvalidMeasurement(
                    f"the server at {self.live.url} did not load it within {self.options.switch_s:g} s ({reason}): it "
                    "refused it (its log says why), or does not follow the repository (make serve POLL_S=2, or the "
                    "stack on a CPU)"
                )
        except BaseException:
            self._take_back()
            raise
        self._settle("live")
        seconds = time.monotonic() - began_s
        return f"version {self.number} after {seconds:.1f} s; not watched under load: nothing was served before"

    def _steady(self, stack: ExitStack) -> SteadyLoad:
        """Starts a load on the live server; tries again if a busy machine delayed it."""
        for attempt in range(1, MOST_ATTEMPTS + 1):
            flags = (*self.candidate.which, *self.live.load_flags(self.number))
            load = stack.enter_context(SteadyLoad(*flags, build=self.options.new_build))
            try:
                load.begin()
                break
            except InvalidMeasurement:  # nothing has been changed yet
                if attempt == MOST_ATTEMPTS:
                    raise
        return load

    def _take_back(self) -> None:
        """Goes back to the old version; the refused one is kept beside the journal."""
        ours, there = (place / MANIFEST for place in (self.journal.folder, self.model / str(self.number)))
        if not there.is_file() or there.read_bytes() != ours.read_bytes():
            return
        if self.before is None:
            move_out_first(self.model, self.number, archive=self.journal.folder / WITHDRAWN)
            self.journal.write(outcome="refused")
        else:
            self.journal.withdraw(self.model, self.number, back_to=self.before, outcome="refused")
            serves, said = self.live.back(self.before)
            self.journal.write(step="taken back", state="holds", said=said)
            if not serves:
                print(f"note: {said}", file=sys.stderr, flush=True)

    def _settle(self, outcome: Outcome) -> None:
        """Records the outcome and removes versions too old for a rollback."""
        self.journal.write(outcome=outcome)
        for old in retire(self.model):
            self.journal.write(step=f"retired {old}", state="holds", said="too old for a rollback")


def check_options(options: argparse.Namespace) -> None:
    """Raises InputError before anything is built: for options that contradict each other, and for a server that does
    not serve the repository. Finds the running stack's local port.
    """
    if options.new_build and not options.new:
        raise InputError(f"--new-build {options.new_build}: name its repository too (--new, NEW=)")
    use_local_port(options)
    LiveServer.find(options, newest(options.repository / options.model))


def check_rate(rate: float, lines: list[Objective]) -> None:
    """Raises InputError if a load at this one rate can never prove the objectives."""
    for line in lines:
        if line.kind == "throughput" and rate < line.limit:
            raise InputError(f"--rate {rate:g}: it must be at least the SLO's {line.name}, {line.limit:g}")
        if line.rate_rps not in (None, rate):
            raise InputError(
                f"--rate {rate:g}: the SLO asks for {line.name} at {line.rate_rps:g} requests/s, and only a load at "
                "that rate proves it; leave --rate (RATE=) out: then the load has every rate of the SLO"
            )


def main(options: argparse.Namespace) -> None:
    """Releases the build, or the candidate that is named; `check_options` has checked the options."""
    spec = DeploymentSpec.of_model(options.model, options.models).for_target(options.target)
    lines = spec.slo.all_objectives()
    if not (options.rate or spec.slo.rate_rps or any(line.rate_rps or line.kind == "throughput" for line in lines)):
        raise InputError(
            f"{options.model}: no rate to measure at; set --rate (RATE=), or rate_rps in [slo] of deploy.toml"
        )
    if options.rate:
        check_rate(options.rate, lines)
    if options.repository.exists() and not options.repository.is_dir():
        raise InputError(f"{options.repository}: not a folder; name the model repository that is served (REPOSITORY=)")
    end_at_sigterm()
    with exclusive(options.model) as releases:
        model = options.repository / options.model
        if newest(model) is not None and not (model / CONFIG).is_file():
            raise InputError(f"{model / CONFIG}: no such file; publish it again: make engine")
        live = LiveServer.find(options, newest(model))
        number = last_number(model) + 1
        for left in releases.glob("*/candidate"):  # left by a killed release
            shutil.rmtree(left)
        where = str(options.repository.resolve())
        journal = ReleaseJournal(releases, "release", number, before=newest(model), repository=where)
        try:
            Release(Candidate(options, spec, journal, number), live).run()
        finally:
            finish(journal, options.model, as_json=options.json)
