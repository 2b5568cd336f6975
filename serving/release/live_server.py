"""The live server, while a release or rollback changes its version.

Contract: queried with `deepseek metadata`, directly or through the gateway. If nothing listens at the default address,
or NVIDIA's Triton of the stack runs, the version is served at the next start. Any other server that listens must report
the repository's newest version: otherwise it serves another repository, or does not follow this one. It must load the
first version of a model.
"""

import argparse
import socket
import time
from dataclasses import dataclass
from typing import Any

from deepseek.spec import GateFailed, InputError
from deepseek.spec.files.read_env_file import GPU_FILES, running_gateway, setting_before
from serving.release.gate_commands import run_json

LOOK_S = 0.5
LONGEST_S = 3  # for the version: a server that hangs must not delay a rollback


def use_local_port(options: argparse.Namespace) -> None:
    """Sets the address to the running stack's local port, unless the user named another."""
    local = setting_before(options.env_file, f"LOCAL_{options.protocol.upper()}_PORT")  # LOCAL_PORTS=8100,8101
    named = options.given & {"url", "http_port", "grpc_port"}
    if local and not named and running_gateway(options.repository, options.env_file):
        options.url = f"127.0.0.1:{local}"


def needs_restart(options: argparse.Namespace) -> str:
    """Why the running stack loads a new version of the repository only at a restart; "" if none runs, or it follows."""
    on_gpu = setting_before(options.env_file, "COMPOSE_FILE").startswith(GPU_FILES)
    gateway = running_gateway(options.repository, options.env_file) if on_gpu else ""
    return f"NVIDIA's Triton behind {gateway} does not follow it (docker compose restart triton)" if gateway else ""


@dataclass(frozen=True, kw_only=True)
class LiveServer:
    """The server when the release or rollback began."""

    options: argparse.Namespace
    version: int | None
    """None if there is no server, or if it has no version yet, as before the first release of a model."""
    absent: str = ""
    """Why there is no server."""

    @classmethod
    def find(cls, options: argparse.Namespace, newest: int | None) -> "LiveServer":
        """Asks the server for its version; raises InputError if that is not the repository's `newest`."""
        if restart := needs_restart(options):
            return cls(options=options, version=None, absent=restart)
        live = cls(options=options, version=None)
        version, reason = live.look()
        if version is None:
            if not live.refuses():
                if newest is None:
                    return live
                raise InputError(
                    f"{reason}; a server may run at {live.url}: restart it with make serve POLL_S=2, stop it, or try "
                    "again when it answers"
                )
            if "url" in options.given:
                raise InputError(f"{reason}; leave the address out to release with no server running")
            if gateway := running_gateway(options.repository, options.env_file):
                raise InputError(
                    f"{reason}, but the stack of this repository runs behind {gateway} and would load the version "
                    f"without the switch gate; name it: URL={gateway} CA_CERT=build/gateway/ca.crt with a key in "
                    "DEEPSEEK_API_KEY"
                )
            return cls(options=options, version=None, absent=f"nothing listens at {live.url}")
        if version != newest:
            raise InputError(
                f"the server at {live.url} has version {version} of {options.model}, but {options.repository} has "
                f"{newest or 'none'}: it serves another repository, or does not follow it; restart it with: make serve "
                "POLL_S=2"
            )
        return cls(options=options, version=version)

    @property
    def url(self) -> str:
        return str(self.options.url)

    def _access(self) -> tuple[str, ...]:
        tls = ("--ca-cert", self.options.ca_cert) if self.options.ca_cert else ()
        return ("--url", self.url, "--protocol", self.options.protocol, *tls)

    def look(self) -> tuple[int | None, str]:
        """The server's version now and "", or None and the reason."""
        answer = run_json(
            "metadata", "--model", self.options.model, *self._access(), "--timeout-s", str(LONGEST_S), "--json"
        )
        if answer.code or not answer.data["versions"]:
            return None, answer.reason or f"{self.url} has no version of {self.options.model}"
        return max(map(int, answer.data["versions"])), ""

    def refuses(self) -> bool:
        """Whether nothing listens there; anything but a refused connection could be a busy server."""
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
        """Flags of `deepseek switch-over-load`; `timeout_s` is for one request."""
        rate = ("--rate", str(self.options.load_rate)) if self.options.load_rate else ()
        longest = ("--max-s", str(self.options.switch_s), "--timeout-s", str(timeout_s))
        times = ("--before-s", str(before_s), "--after-s", str(after_s), *longest)
        return (*self._access(), "--target", self.options.target, *times, *rate, "--until", str(until))

    def judged(self, found: dict[str, Any], number: int, *, failing: bool = False) -> str:
        """Sums up the load in a line; raises GateFailed if the server did not switch or a request was lost.

        With `failing`, the old version failed requests too: only failures after the switch count.
        """
        lost = found["since_seen"] if failing else found
        failures = ""
        if lost["failed"]:
            error, times = next(iter(lost["errors"].items()))
            since = "after the switch" if failing else "since the change"
            failures = f"{lost['failed']} of {found['requests']} requests failed {since} ({times} times: {error})"
        if found["switched_s"] is None:
            raise GateFailed("; ".join(filter(None, (self.not_switched(found, number), failures))))
        if failures:
            raise GateFailed(failures)
        before, around = (_ms(found[part]["p99_ms"]) for part in ("before", "around"))
        fate = f"{found['failed']} failed before the switch, none after it" if failing else "none failed"
        return (
            f"version {number} after {found['switched_s']:.1f} s; {found['requests']} requests, {fate}; "
            f"p99 {around} around the switch, {before} before it"
        )

    def not_switched(self, found: dict[str, Any], number: int) -> str:
        """Why the load did not see version `number`; `found` has the version that the server reported at the end."""
        if found["version"] is None:
            return f"the server at {self.url} does not answer any more: it ended or hangs (its log says why)"
        return (
            f"the server at {self.url} still had version {found['version']} after {self.options.switch_s:g} s: it "
            f"refused version {number} (its log says why), or does not follow the repository (make serve POLL_S=2, or "
            "the stack on a CPU)"
        )

    def back(self, version: int, timeout_s: float = 30) -> tuple[bool, str]:
        """Waits until the server has a version again; returns whether it has, and a line that says so."""
        seen, _ = self.wait_for(version, timeout_s)
        if seen != version:
            return False, f"the repository has version {version}, the server has {seen or 'none'}: restart it"
        return True, f"version {version} serves"

    def wait_for(self, version: int, timeout_s: float) -> tuple[int | None, str]:
        """What `look` returns once the server has the version, or after `timeout_s`."""
        ends_at = time.monotonic() + timeout_s
        while (found := self.look())[0] != version and time.monotonic() < ends_at:
            time.sleep(LOOK_S)
        return found


def _ms(value: float | None) -> str:
    return "of no request" if value is None else f"{value:.1f} ms"
