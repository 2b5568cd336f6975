"""The image of NVIDIA's Triton: entry point and health check beside a start-up file like that of NVIDIA's shells."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

# Like /etc/shinit_v2 of NVIDIA's 25.08: it reads variables that are not set and takes the output of a failing command.
STARTUP = """\
if [ -n "$_CUDA_COMPAT_REALLIB" ]; then export LD_LIBRARY_PATH="$_CUDA_COMPAT_REALLIB"; fi
driver=$(false)
export STARTED=$((${STARTED:-0} + 1))
echo started >>"$MARK"
"""


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment as in NVIDIA's images, with stand-ins for the programs that the entry point calls."""
    (tmp_path / "startup").write_text(STARTUP)
    programs = {
        "python": 'case "$*" in *flags*) echo --model-repository=/models;; esac',
        "tritonserver": 'env; echo "$@"',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.defpath}", "MARK": str(tmp_path / "mark"), "BASH_ENV": str(tmp_path / "startup")}


def test_tritonserver_starts_after_nvidias_start_up_file_and_with_what_it_exported(shell: dict[str, str]) -> None:
    run = subprocess.run(["docker/server.sh"], env=shell, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *exported, flags = run.stdout.splitlines()
    assert flags == "--model-repository=/models --metrics-config=histogram_latencies=true"
    assert "STARTED=1" in exported
    assert not any(line.startswith("LD_PRELOAD=") for line in exported)  # the wake-up library was not tested here


class Healthy(BaseHTTPRequestHandler):
    """Answers /v2/health/ready with 200 and everything else with 404."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("path", "status"), [("/v2/health/ready", 0), ("/other", 1)])
def test_a_health_check_does_not_run_nvidias_start_up_file(
    shell: dict[str, str], port: int, path: str, status: int
) -> None:
    run = subprocess.run(["docker/healthy.sh", str(port), path], env=shell, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (status, "")
    assert not Path(shell["MARK"]).exists()
