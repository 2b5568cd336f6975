"""A real Docker engine for the tests: this machine's, or one that `../shared/docker_here.sh` starts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

HERE = Path("../shared/docker_here.sh")  # gives a machine without a registry an engine and Debian's image


def run(
    *command: str, check: bool = True, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    assert not check or done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


def answers(**environment: str) -> bool:
    asked = (("docker", "compose", "version"), ("docker", "info"))
    found = shutil.which("docker") is not None
    return found and all(run(*each, check=False, environment=environment).returncode == 0 for each in asked)


@contextlib.contextmanager
def own_engine(name: str, **environment: str) -> Iterator[dict[str, str]]:
    """The environment of an engine that is started for the tests, and stopped again unless it ran before.

    `name` is the folder of its images; they are kept, so that the next run need not build them. Skips the test if this
    machine cannot start one.
    """
    if not HERE.is_file() or os.getuid() != 0:
        pytest.skip("no Docker engine with Compose can be started (that takes root)")
    folder = os.environ.get("DOCKER_HERE", f"{tempfile.gettempdir()}/docker-here") + name
    settings = {**environment, "DOCKER_HERE": folder}
    with Path(tempfile.gettempdir(), "docker-here.lock").open("w") as lock:  # it installs packages
        fcntl.flock(lock, fcntl.LOCK_EX)
        if shutil.which("dockerd") is None:  # the script would take a stand-in on `environment`'s PATH for it
            run("apt-get", "update", "-qq")
            run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "docker.io")
        ran = answers(DOCKER_HOST=f"unix://{folder}/docker.sock")
        lines = run(str(HERE), environment=settings).stdout.splitlines()
    yield {**dict(word.split("=", 1) for word in lines[-1].split()[1:]), "BUILD_NETWORK": "host"}
    if not ran:
        run(str(HERE), "stop", environment=settings)
