"""A server as a child process that does not start is refused in one line; a child's environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepseek.spec import InputError
from deepseek.spec.processes.child_server import child_server
from deepseek.spec.processes.children import our_environment


@pytest.mark.parametrize(
    ("command", "timeout_s", "reason"),
    [
        ("sleep 60", 0.2, "not ready within 0.2 s, the limit of --longer"),
        ("sh -c 'echo error: no model in {repository}; exit 2'", 60, "no model in /.*/repository"),
        ("sh -c 'exit 3'", 60, "ended with status 3"),
        ("no-such-server", 60, "--server: no-such-server cannot be started: No such file or directory"),
    ],
)
def test_a_server_that_does_not_start_is_one_line(tmp_path: Path, command: str, timeout_s: float, reason: str) -> None:
    repository, log = tmp_path / "repository", tmp_path / "server.log"
    repository.mkdir()
    server = child_server(
        command, repository, log, ready=lambda server: False, timeout_s=timeout_s, limit=", the limit of --longer"
    )
    with pytest.raises(InputError, match=f"^{reason}$"), server:
        pass


def test_a_child_of_ours_finds_the_rooms_of_the_checkout() -> None:
    assert Path(our_environment()["PYTHONPATH"].split(os.pathsep)[0], "cli", "__main__.py").is_file()
