"""Back to the version before, in seconds.

The version that is served leaves the repository, and the newest intact one before it is the newest again, under its own
`config.pbtxt`. A server that follows the repository goes back at once, measured under a steady load where it still
answers; any other does at its next start. The alerts of a compose stack over the repository expect the older one from
then on. Called again, it goes back one more.

Contract: the version to go back to is checked first, digests included; where none is intact nothing is changed. No full
disk keeps the other one in service: it is renamed out of servers' sight first, then kept in the record's folder,
`build/<model>/releases/<time>/withdrawn/`, as far as there is room.

Exit codes: 0 back; 1 there is nothing intact to go back to, the server does not follow, or requests failed on the way:
with the version before failing some, too, only those after it count.

Examples:
    python -m serving.rollback --model recommender
    python -m serving.rollback --model recommender --url 127.0.0.1:8001
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path
from typing import Any

from deepseek.spec import GateFailed, InputError, InvalidMeasurement, Parser, add_model_arguments, run_command
from serving.commands import SteadyLoad
from serving.live import Live, add_live_arguments, check_live_arguments
from serving.releases import Journal, Steps, alone, expect_anew, finish
from serving.versions import earlier, newest


class Rollback:
    """From one version to the one before."""

    def __init__(self, args: argparse.Namespace, journal: Journal, number: int, back_to: int) -> None:
        self.args, self.journal, self.number, self.back_to = args, journal, number, back_to
        self.model = Path(args.repository) / args.model
        self.live = Live(args=args, version=None)

    def run(self) -> None:
        """Changes the repository and watches the server."""
        version, reason = self.live.look()
        steps = Steps(self.journal, as_json=self.args.json)
        try:
            if version is not None:
                steps.do("switch", self.switch)
            elif self.live.refuses():
                steps.do("repository", lambda: self._offline(reason))
            else:
                steps.do("switch", lambda: self._unwatched(reason))
        finally:
            if not (self.model / str(self.number)).exists():
                steps.do("stack", lambda: expect_anew(self.model.parent))

    def switch(self) -> str:
        """Under load where the server still takes it: a version that fails every request is no reason to keep it."""
        which = ("--model", self.args.model, "--models", self.args.models)
        times = self.live.load_flags(self.back_to, before_s=1, after_s=2, timeout_s=3)
        with SteadyLoad(*which, *times, "--may-fail") as load:
            try:
                load.begin()
            except (GateFailed, InputError, InvalidMeasurement) as error:
                return self._unwatched(str(error))
            load.change()
            self._take_out()
            found: dict[str, Any] = load.result()
        self.journal.keep("switch.json", found)
        if found["switched_s"] is None:
            raise GateFailed(
                f"the repository is back at version {self.back_to}, the server at {self.live.url} still gives "
                f"{found['version']}: it does not follow the repository, restart it"
            )
        return self.live.judged(found, self.back_to, failing=found["failed_before"] > 0)

    def _offline(self, reason: str) -> str:
        """No server gives the model now."""
        self._take_out()
        return f"version {self.back_to} is the newest in {self.model}, served at the server's next start; {reason}"

    def _unwatched(self, reason: str) -> str:
        """The server answers no real request: only its version is asked for."""
        began_s = time.monotonic()
        self._take_out()
        said = self.live.back(self.back_to, timeout_s=self.args.switch_s)
        if "serves" not in said:
            raise GateFailed(said)
        return f"{said} after {time.monotonic() - began_s:.1f} s; no load before it: {reason}"

    def _take_out(self) -> None:
        self.journal.withdraw(self.model, self.number, back_to=self.back_to, outcome="rolled back")


def main() -> None:
    """Rolls one model back."""
    parser = Parser(__doc__, prog="python -m serving.rollback")
    add_model_arguments(parser)
    parser.add_argument("--repository", default="model_repository", help="that is served (default: %(default)s)")
    add_live_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the record as JSON at the end")
    args = parser.parse_args()
    check_live_arguments(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with alone(args.model) as releases:
        model = Path(args.repository) / args.model
        number = newest(model)
        if number is None:
            raise InputError(f"{model}: no version to go back from; make one with: make engine")
        back_to = earlier(model)
        where = str(Path(args.repository).resolve())
        journal = Journal(releases, "rollback", back_to, may_fail=True, before=number, repository=where)
        try:
            Rollback(args, journal, number, back_to).run()
        finally:
            finish(journal, args.model, as_json=args.json)


if __name__ == "__main__":
    run_command(main)
