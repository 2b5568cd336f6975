"""The server that callers have, while a release or a rollback changes its version.

Contract: asked over the client's own command, directly or through the gateway. Nothing listening at the default address
is no error: what is in the repository is served at the next start. A server that is there has to answer, with the
version that is the repository's newest: else it serves another repository, or does not follow this one.

Example:
    live = Live.find(args, newest=4)
    live.version        # 4, None where no server answers
"""

from __future__ import annotations

import argparse
import math
import socket
import time
from dataclasses import dataclass
from typing import Any

from deepseek.spec import GateFailed, InputError, Parser
from serving.commands import ask

DEFAULT_URL = {"grpc": "127.0.0.1:8001", "http": "127.0.0.1:8000"}
LOOK_S = 0.5
MOST_RPS = 200  # that loadtests.steady sends
LONGEST_S = 3  # for the version: a server that hangs must not keep a rollback


def add_live_arguments(parser: Parser) -> None:
    """Where the server is, and how it is watched."""
    parser.add_argument("--url", help="host:port of the server that callers have (default: 127.0.0.1:8001, if there)")
    parser.add_argument("--may-be-absent", action="store_true", help="no server at --url is no error")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="(default: %(default)s)")
    parser.add_argument("--ca-cert", metavar="FILE", help="of a gateway: trust this; $DEEPSEEK_API_KEY is sent")
    parser.add_argument(
        "--load-rate", type=float, help=f"requests/s while it switches (default: the SLO's, {MOST_RPS} at most)"
    )
    parser.add_argument(
        "--switch-s", type=float, default=60, help="longest wait for the server to switch (default: %(default)s)"
    )


def check_live_arguments(args: argparse.Namespace) -> None:
    """Raises InputError for what would only be refused at the switch."""
    if args.load_rate is not None and not 0 < args.load_rate <= MOST_RPS:
        raise InputError(f"--load-rate {args.load_rate:g}: more than 0 and at most {MOST_RPS} requests/s")
    if not 0 < args.switch_s < math.inf:
        raise InputError(f"--switch-s {args.switch_s:g}: it must be more than 0")


@dataclass(frozen=True, kw_only=True)
class Live:
    """The server, as it was when the release began."""

    args: argparse.Namespace
    version: int | None
    absent: str = ""
    """Why there is none."""

    @classmethod
    def find(cls, args: argparse.Namespace, newest: int | None) -> Live:
        """Asks which version it gives; InputError where that is not the repository's `newest`."""
        if newest is None:
            return cls(args=args, version=None, absent="nothing was served before")
        live = cls(args=args, version=None)
        version, reason = live.look()
        if version is None:
            if not live.refuses():
                raise InputError(f"{reason}; something may serve at {live.url}: try again when it answers, or stop it")
            if args.url and not args.may_be_absent:
                raise InputError(f"{reason}; leave the address out to release with no server running")
            return cls(args=args, version=None, absent=f"nothing listens at {live.url}")
        if version != newest:
            raise InputError(
                f"the server at {live.url} gives version {version} of {args.model}, {args.repository} has {newest}: it "
                "serves another repository, or does not follow it; start it anew, with: make serve POLL_S=2"
            )
        return cls(args=args, version=version)

    @property
    def url(self) -> str:
        """host:port."""
        return str(self.args.url or DEFAULT_URL[self.args.protocol])

    def _access(self) -> tuple[str, ...]:
        tls = ("--ca-cert", self.args.ca_cert) if self.args.ca_cert else ()
        return ("--url", self.url, "--protocol", self.args.protocol, *tls)

    def look(self) -> tuple[int | None, str]:
        """The version that it gives now, or why none."""
        answer = ask(
            "deepseek_client", "metadata", self.args.model, *self._access(), "--timeout-s", str(LONGEST_S), "--json"
        )
        if answer.code or not answer.data["versions"]:
            return None, answer.reason or f"{self.url} names no version of {self.args.model}"
        return max(map(int, answer.data["versions"])), ""

    def refuses(self) -> bool:
        """Whether nothing listens there: anything but a refused connection may be a server that is busy."""
        host, _, port = self.url.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LONGEST_S).close()
        except ConnectionRefusedError:
            return True
        except (OSError, ValueError, OverflowError):
            return False
        return False

    def load_flags(
        self, until: int, *, before_s: float = 3, after_s: float = 3, timeout_s: float = 10
    ) -> tuple[str, ...]:
        """Of `loadtests.steady`; `timeout_s` is a request's."""
        rate = ("--rate", str(self.args.load_rate)) if self.args.load_rate else ()
        longest = ("--max-s", str(self.args.switch_s), "--timeout-s", str(timeout_s))
        times = ("--before-s", str(before_s), "--after-s", str(after_s), *longest)
        return (*self._access(), *times, *rate, "--until", str(until))

    def judged(self, found: dict[str, Any], number: int, *, failing: bool = False) -> str:
        """What the load saw, in a line; GateFailed where the server did not switch or a request was lost.

        With `failing`, the version before failed requests, too: those till the switch are its own.
        """
        if found["switched_s"] is None:
            raise GateFailed(
                f"the server at {self.url} went on with version {found['version']} for {self.args.switch_s:g} s: it "
                "refused the new one (its log says why), or does not follow the repository (make serve POLL_S=2, or "
                "compose with docker/compose.follow.yaml)"
            )
        lost = found["since_seen"] if failing else found
        if lost["failed"]:
            error, times = next(iter(lost["errors"].items()))
            since = "after the switch" if failing else "since the change"
            raise GateFailed(
                f"{lost['failed']} of {found['requests']} requests failed {since} ({times} times: {error})"
            )
        before, around = (_ms(found[part]["p99_ms"]) for part in ("before", "around"))
        fate = f"{found['failed']} failed till the switch, none after it" if failing else "none failed"
        return (
            f"version {number} after {found['switched_s']:.1f} s; {found['requests']} requests, {fate}; "
            f"p99 {around} around the switch, {before} before it"
        )

    def back(self, version: int, timeout_s: float = 30) -> str:
        """Waits until the server gives a version again; says whether it does."""
        ends_at = time.monotonic() + timeout_s
        while (seen := self.look()[0]) != version:
            if time.monotonic() > ends_at:
                return f"the repository has version {version}, the server gives {seen or 'none'}: restart it"
            time.sleep(LOOK_S)
        return f"version {version} serves"


def _ms(value: float | None) -> str:
    return "of no request" if value is None else f"{value:.1f} ms"
