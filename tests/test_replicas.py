"""Several Tritons behind the gateway on one machine, as a headless service lists them: one comes, one is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.embedded.launcher import EmbeddedServer
from serving.repository.served_models import served_models
from serving.stack.gateway_limits import limits
from tests.conftest import write_add_one
from tests.gateway import Gateway, free_port, skip_without_nginx, wait_for

pytestmark = pytest.mark.slow
ADDRESSES = ("127.0.0.1", "127.0.0.2")
CALLERS = 4  # of each protocol
RECENT = 20  # requests of one protocol that the share is taken of


class Callers:
    """Calls over HTTP and gRPC, in several threads each, until told to stop; keeps what failed.

    By clients of a stateless model: when nginx reads its files anew, it closes idle connections over HTTP, on some of which
    a request may be under way. A client that may run it twice sends it again.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.failed: list[str] = []
        self.made: list[str] = []
        self._gateway, self._stop = gateway, threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(kind,)) for kind in ("http", "grpc") * CALLERS]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self, kind: str) -> None:
        with self._gateway.client(kind, idempotent=True) as client:
            while not self._stop.wait(0.02):
                try:
                    client.infer("add_one", {"x": np.zeros((1, 2, 3), np.float32)})
                    self.made.append(kind)
                except Exception as error:
                    self.failed.append(f"{kind}: {error!r}")


class Names:
    """What the name `triton` stands for: a `getent` on the gateway's PATH answers from a file, in place of the DNS."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = folder / "addresses"
        (folder / "bin").mkdir()
        (folder / "bin" / "getent").write_text(
            f'#!/bin/sh\nwhile read -r each; do echo "$each STREAM triton"; done <{self._file}\n'
        )
        (folder / "bin" / "getent").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin")

    def be(self, *addresses: str) -> None:
        part = self._file.with_suffix(".part")
        part.write_text("".join(f"{address}\n" for address in addresses))
        part.replace(self._file)


def server(folder: Path, address: str, ports: dict[str, Any]) -> EmbeddedServer:
    log = folder / f"{address}.log"
    return EmbeddedServer(
        folder / "repository", address=address, **ports, log_path=log, behind_gateway=True, exit_timeout_s=1
    )


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    skip_without_nginx()
    write_add_one(tmp_path / "repository")
    return Names(tmp_path, monkeypatch)


def share(gateway: Gateway, protocol: str, address: str) -> float:
    """Of the last requests of a protocol, those that the replica at an address answered."""
    lines = [line for line in gateway.lines(api="infer") if line["protocol"] == protocol][-RECENT:]
    tried = [re.split(", | : ", line["triton"]) for line in lines]
    return sum(each[-1].startswith(f"{address}:") for each in tried) / len(lines)


def wait_for_share(gateway: Gateway, address: str, least: float, most: float) -> None:
    """Until so much of the last requests, of both protocols, went to an address."""
    protocols = ("HTTP/1.1", "HTTP/2.0")
    wait_for(lambda: all(least <= share(gateway, protocol, address) <= most for protocol in protocols))


def test_a_new_replica_takes_its_share_within_seconds_and_a_killed_one_costs_no_request(
    tmp_path: Path, names: Names
) -> None:
    first, second = ADDRESSES
    ports: dict[str, Any] = {f"{name}_port": free_port() for name in ("http", "grpc", "metrics")}
    names.be(first)
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(server(tmp_path, first, ports))
        # Up before the calls, in no list yet: a process that is forked while gRPC's threads run may crash.
        stack.enter_context(server(tmp_path, second, ports))
        text = limits(served_models(tmp_path / "repository", tmp_path))
        gateway = Gateway(tmp_path, text, f"triton:{ports['http_port']}", f"triton:{ports['grpc_port']}")
        stack.callback(gateway.stop)
        with Callers(gateway) as callers:
            time.sleep(2)
            assert share(gateway, "HTTP/1.1", first) == share(gateway, "HTTP/2.0", first) == 1
            names.be(first, second)
            wait_for_share(gateway, second, 0.3, 0.7)
            os.kill(old.pid, signal.SIGKILL)  # and its address stays on the list for a while
            wait_for_share(gateway, second, 1, 1)
            names.be(second)
            for reload in range(4):
                time.sleep(0.5)
                (gateway.folder / "limits.conf").write_text(f"{text}# {reload}\n")
    assert callers.failed == []
    assert len(callers.made) > 100
