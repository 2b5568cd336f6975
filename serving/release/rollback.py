"""The command `rollback`: goes back to the previous version, in seconds.

The served version leaves the repository, and the newest intact one before it is the newest again, with its own
`config.pbtxt`. A server that follows the repository goes back at once, under a steady load if it still answers; any
other server does at its next start, NVIDIA's Triton of the stack included.

Contract: the version to go back to is checked first, digests included; if none is intact, nothing changes. A full disk
does not stop a rollback: the withdrawn version is first hidden from servers by a rename, then moved to the record's
folder if there is room. If the withdrawn version fails requests, only failures after the switch count.
"""

import argparse
import time
from typing import Any

from deepseek.spec import GateFailed, InputError, InvalidMeasurement
from deepseek.spec.command import end_at_sigterm
from deepseek.spec.files.read_env_file import running_gateway
from serving.release.gate_commands import SteadyLoad
from serving.release.history import finish
from serving.release.journal import ReleaseJournal, exclusive
from serving.release.live_server import LiveServer, needs_restart, use_local_port
from serving.release.step_runner import StepRunner, refresh_stack
from serving.release.versions import newest, previous_intact


class Rollback:
    def __init__(self, options: argparse.Namespace, journal: ReleaseJournal, number: int, back_to: int) -> None:
        self.options, self.journal, self.number, self.back_to = options, journal, number, back_to
        self.model = options.repository / options.model
        self.live = LiveServer(options=options, version=None)

    def run(self) -> None:
        restart = needs_restart(self.options)
        version, reason = (None, restart) if restart else self.live.look()
        steps = StepRunner(self.journal, as_json=self.options.json)
        try:
            if version is not None:
                steps.do("switch", self.switch)
            elif restart or self.live.refuses():
                gateway = "" if restart else running_gateway(self.options.repository, self.options.env_file)
                follows = f"which the stack behind {gateway} follows within seconds; not watched: it has no local port"
                when = follows if gateway else f"served at the server's next start; {reason}"
                steps.do("repository", lambda: self._offline(when))
            else:
                steps.do("switch", lambda: self._unwatched(reason))
        finally:
            if not (self.model / str(self.number)).exists():
                steps.do("stack", lambda: refresh_stack(self.model.parent))

    def switch(self) -> str:
        """Switches under load; goes back without load if the server fails every request."""
        which = ("--model", self.options.model, "--models", str(self.options.models))
        times = self.live.load_flags(self.back_to, before_s=1, after_s=2, timeout_s=3)
        with SteadyLoad(*which, *times, "--may-fail") as load:
            try:
                load.begin()
            except (GateFailed, InputError, InvalidMeasurement) as error:
                return self._unwatched(str(error))
            load.change()
            self._take_out()
            try:
                found: dict[str, Any] = load.result()
            except InvalidMeasurement as error:  # the repository is back: only the load is lost
                return self._unwatched(str(error))
        self.journal.keep("switch.json", found)
        if found["switched_s"] is None:
            raise GateFailed(
                f"the repository is back at version {self.back_to}, but "
                f"{self.live.not_switched(found, self.back_to)}; restart it"
            )
        return self.live.judged(found, self.back_to, failing=found["failed_before"] > 0)

    def _offline(self, when: str) -> str:
        self._take_out()
        return f"version {self.back_to} is the newest in {self.model}, {when}"

    def _unwatched(self, reason: str) -> str:
        """Changes the repository and watches only the server's version: it does not answer requests."""
        began_s = time.monotonic()
        self._take_out()
        serves, said = self.live.back(self.back_to, timeout_s=self.options.switch_s)
        if not serves:
            raise GateFailed(said)
        return f"{said} after {time.monotonic() - began_s:.1f} s; not watched under load: {reason}"

    def _take_out(self) -> None:
        self.journal.withdraw(self.model, self.number, back_to=self.back_to, outcome="rolled back")


def main(options: argparse.Namespace) -> None:
    use_local_port(options)
    end_at_sigterm()
    with exclusive(options.model) as releases:
        model = options.repository / options.model
        number = newest(model)
        if number is None:
            raise InputError(f"{model}: no version to go back from; build one with: make engine")
        back_to = previous_intact(model)
        where = str(options.repository.resolve())
        journal = ReleaseJournal(releases, "rollback", back_to, may_fail=True, before=number, repository=where)
        try:
            Rollback(options, journal, number, back_to).run()
        finally:
            finish(journal, options.model, as_json=options.json)
